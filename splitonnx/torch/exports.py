"""Export a network for training, and refuse an export that differs from the network."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from splitonnx.atomic import replace_file
from splitonnx.errors import UnwritableFile, UsageError
from splitonnx.outputs import check_output
from splitonnx.partitioner.cutting.passes.stored_options import StoredOptions, write_stored
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.normalization.weights import make_pattern
from splitonnx.torch.calls import call_exporter
from splitonnx.torch.comparisons import check_modes, check_tensors, compare_results
from splitonnx.torch.environment import import_torch
from splitonnx.torch.examples import Example, read_example
from splitonnx.torch.gradients.agreements import Training, compare_gradients
from splitonnx.torch.gradients.detachments import find_paddings, stop_paddings
from splitonnx.torch.networks import (
    Layout,
    keeping_state,
    read_arrays,
    read_layout,
    start_training,
)
from splitonnx.torch.observations import call, observe
from splitonnx.torch.repairs import (
    mark_checked,
    restore_buffers,
    train_batchnorms,
    turn_on_dropouts,
)

MOST_BYTES = 2**31 - 2**26
"""The total size of weights, in bytes, that fits into one ONNX file."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Export:
    """An exported model that computes what the network computes.

    ``model`` contains the model as bytes, in a form that ``cut`` accepts.  ``path`` is the file, or
    ``None`` if no file was written.  ``exporter`` is ``legacy`` or ``dynamo``.  ``parameters`` are
    the names of the parameters that are stored in the model.  ``unused`` are the names of the
    parameters that get no gradient from the network's outputs.  ``difference`` is the largest
    relative difference between the results of the model and the results of the network.
    ``gradient_difference`` is the largest relative difference between their gradients, or ``None``
    if gradients were not compared.

    ``freeze``, ``train`` and ``stop_gradients`` are arguments of ``cut``.  Without them, it would
    train other tensors than PyTorch does, or pass gradients through a ``detach`` or to the padding
    row of an Embedding.  They are stored in the model, too, so ``cut`` applies them by itself.
    """

    model: bytes = field(repr=False)
    path: Path | None
    exporter: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parameters: tuple[str, ...]
    unused: tuple[str, ...]
    freeze: tuple[str, ...]
    train: tuple[str, ...]
    stop_gradients: tuple[str, ...]
    difference: float
    gradient_difference: float | None


def export(
    model: Any,
    example: Any,
    path: str | Path | None = None,
    *,
    output_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> Export:
    """Export a PyTorch network for training.

    BatchNormalization and Dropout are written in training mode, and parameters keep their names.
    Constants are not folded.  The first axis of every input is a batch of any size.  The network
    itself is not changed.

    The export is then compared with the network: the names and values of its tensors, the modes of
    its layers, and its results in eval mode for two batch sizes.  If the network has
    BatchNormalization, the results in training mode are compared too.  The gradients that ``cut``
    would compute are compared with PyTorch's, without dropout; if this is not possible, a warning
    is logged.

    A network in eval mode is exported as if it were in training mode.  If the network is in
    training mode, modules that you have put into eval mode are exported in eval mode.

    Args:
        model: a ``torch.nn.Module`` that takes and returns tensors.
        example: the inputs of one call: a tensor, a tuple of tensors, or a dictionary from the
            names of the parameters of ``forward`` to tensors.  The first axis of each tensor is the
            batch.
        path: the file to write; without it, the model is only returned.
        output_names: the names of the outputs.  By default, these are the keys of the dictionary
            that the network returns, ``output`` for a single tensor, or ``output_0`` and so on.
        overwrite: whether ``path`` may exist already.

    Raises:
        TorchNeeded: PyTorch or onnxscript is missing or too old.
        UsageError: the example or the names do not fit the network, the weights are too large for
            one ONNX file, or a tensor has the type bfloat16.
        NotExported: PyTorch's exporters refuse the network.
        WrongExport: the exported model differs from the network.
        ModelError: splitonnx does not support the exported model.
        UnwritableFile: ``path`` cannot be written, or exists already.
    """
    torch = import_torch("splitonnx.torch.export")
    target = None if path is None else Path(path)
    if target is not None:
        check_output(target, overwrite=overwrite)
    inputs = read_example(torch, model, example)
    layout, arrays = read_layout(model), read_arrays(model)
    _check_types(model, inputs)
    _check_size(sum(array.nbytes for array in arrays.values()))
    name = type(model).__name__
    with keeping_state(torch, model):
        model.eval()
        outputs, varying = _name_outputs(torch, model, inputs, output_names)
    with keeping_state(torch, model):
        start_training(model)
        seen = observe(torch, model, inputs)
    with keeping_state(torch, model):
        start_training(model)
        called = call_exporter(
            torch,
            model,
            inputs,
            outputs,
            varying,
            recurrent_dropout=seen.recurrent_dropout,
        )
    proto = called.model
    restore_buffers(proto, {n: array for n, array in arrays.items() if n in layout.buffers})
    means = {other for mean in seen.training for other in layout.groups[mean]}
    train_batchnorms(proto, means)
    turn_on_dropouts(proto)
    padded = stop_paddings(proto, find_paddings(torch, model, layout))
    mark_checked(proto)
    check_tensors(name, proto, layout, arrays, seen)
    check_modes(name, proto, layout, seen)
    with keeping_state(torch, model):
        start_training(model)
        difference = compare_results(torch, model, proto, inputs, outputs, seen)
    idle, kept = _find_trained(proto, layout, seen.unused)
    freeze, train = _make_patterns(idle), _make_patterns(kept)
    training = Training(model=proto, freeze=freeze, train=train)
    with keeping_state(torch, model):
        start_training(model)
        agreement = compare_gradients(
            torch, model, training, inputs, outputs, layout, (*called.detached, *padded)
        )
    _say_stops(agreement.stop_gradients)
    options = StoredOptions(freeze=idle, train=kept, stop_gradients=agreement.stop_gradients)
    write_stored(proto, options)
    content: bytes = proto.SerializeToString()
    if target is not None:
        _write(target, content)
    stored = {tensor.name for tensor in proto.graph.initializer}
    return Export(
        model=content,
        path=target,
        exporter=called.exporter,
        inputs=tuple(value.name for value in proto.graph.input),
        outputs=tuple(outputs),
        parameters=tuple(sorted(stored & layout.parameters)),
        unused=tuple(sorted(seen.unused)),
        freeze=freeze,
        train=train,
        stop_gradients=agreement.stop_gradients,
        difference=difference,
        gradient_difference=agreement.difference,
    )


def _name_outputs(
    torch: Any, model: Any, example: Example, names: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Return the names of all outputs, and of those whose first axis is the batch."""
    results = [call(torch, model, one) for one in (example, example.resize(example.batch + 1))]
    first, second = (list(result.values()) for result in results)
    chosen = list(results[0]) if names is None else list(names)
    if len(chosen) != len(first) or len(set(chosen)) != len(chosen):
        raise UsageError(
            f"output_names should be {len(first)} different names, one for each tensor that the "
            f"network returns, not {chosen}"
        )
    if clash := set(chosen) & set(example.tensors):
        raise UsageError(
            f"outputs and inputs should have different names, but both have {sorted(clash)}; name "
            "the outputs with output_names"
        )
    batches = [example.batch, example.batch + 1]
    varying = [
        name
        for name, *pair in zip(chosen, first, second, strict=True)
        if [array.shape[0] if array.ndim else None for array in pair] == batches
    ]
    return chosen, varying


def _find_trained(
    model: onnx.ModelProto, layout: Layout, unused: frozenset[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Find and log the tensors that ``cut`` has to freeze, and those that it has to train.

    It then trains what the network trains.
    """
    prepared = prepare(open_model(model))
    stored = [tensor.name for tensor in model.graph.initializer]
    own = [name for name in stored if name in layout.groups]
    learnt = {name for name in own if layout.learnt.intersection(layout.groups[name])}
    learnt = {name for name in learnt if unused.isdisjoint(layout.groups[name])}
    trained = set(prepared.trainable)
    idle = tuple(name for name in prepared.trainable if name not in learnt)  # also the exporter's
    kept = tuple(name for name in own if name in learnt - trained)
    for names, option, what in (
        (idle, "freeze", "are constants or buffers, or get no gradient in the network"),
        (kept, "train", "are parameters of the network, but look like constants"),
    ):
        if names:
            _log.warning(
                "%s %s: the model's file says so, and cut applies --%s '%s'",
                ", ".join(names),
                what,
                option,
                make_pattern(names),
            )
    return idle, kept


def _make_patterns(names: Sequence[str]) -> tuple[str, ...]:
    return (make_pattern(names),) if names else ()


def _say_stops(names: Sequence[str]) -> None:
    """Log the tensors at which ``cut`` stops gradients."""
    if names:
        options = " ".join(f"--stop-gradient '{name}'" for name in names)
        _log.warning(
            "the network passes no gradient through %s: the model's file says so, and cut applies "
            "%s",
            ", ".join(names),
            options,
        )


def _check_types(model: Any, example: Example) -> None:
    """Refuse bfloat16, for which ONNX Runtime has too few CPU kernels to compare results."""
    tensors = [*model.parameters(), *model.buffers(), *example.tensors.values()]
    if any(str(tensor.dtype) == "torch.bfloat16" for tensor in tensors):
        raise UsageError(
            "a network in bfloat16 cannot be compared with its export: export model.float(), and "
            "load the trained weights into the network in bfloat16"
        )


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise UsageError(
            f"the network's weights take {size / 1e9:.2f} GB, more than one ONNX file holds; "
            "export it by hand, with its weights beside the model, as docs/exporting.md says"
        )


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, [content])
    except OSError as error:
        raise UnwritableFile(str(path), error.strerror or str(error)) from error
