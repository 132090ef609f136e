"""Join the trained weights of all parties into one plain ONNX model for inference."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from splitonnx.bundles import Bundle
from splitonnx.errors import UsageError, count_some, quote
from splitonnx.losses import FROM_MODEL
from splitonnx.manifests import Role
from splitonnx.outputs import check_output
from splitonnx.partitioner.adapter_files import write_note_file
from splitonnx.partitioner.adapters import fold_adapters, read_note, write_note
from splitonnx.partitioner.cutting.passes.forms import make_inference_form
from splitonnx.partitioner.gate.gates import ModelSource, open_model
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.lowerings.integer_kernels import describe_saturation
from splitonnx.partitioner.model_files import serialize_model, write_model
from splitonnx.partitioner.model_losses import drop_losses
from splitonnx.partitioner.normalization.quantizations import fold_quantized
from splitonnx.partitioner.normalization.weights import restore_weights

Source = Bundle | ModelSource
"""A bundle, the path of its folder, or an ONNX model with adapters."""

_log = logging.getLogger(__name__)


def merge(bundle: Source, *, fold: bool = False, raw_states: bool = False) -> bytes:
    """Join the parts of a bundle into one ONNX model that contains the trained weights.

    The model has the same inputs and outputs as the original model.  It is meant for inference:
    BatchNormalization uses its running statistics, and Dropout is removed.

    Args:
        bundle: a bundle, or the path of a bundle folder.  If ``fold`` is true, it may also be an
            ONNX model with adapters, as a path, bytes or an object, which otherwise stays as it is.
        fold: add the adapters of the model (see :func:`splitonnx.adapt`) to its weights, so that
            the model has the nodes that it had without adapters.
        raw_states: whether states that hold raw inputs get their last values, too.  Otherwise the
            model has the initial values of the original model there, so that the file contains no
            samples, and a warning names these states.

    Returns:
        The bytes of the model (of a bundle, opset 18 to 21, IR version 10), including its weights.

    Raises:
        BundleError, FormatError: the folder cannot be read.
        BundleMismatch: the parties are at different steps.
        UsageError: the model is too large for one file; :func:`write_merged` can write two.  Or
            ``fold`` is true, and the model has no adapters.
        ModelError: the model cannot be read, or its adapters cannot be folded.
    """
    return serialize_model(
        _make_merged(bundle, fold, raw_states),
        "the merged model",
        "write_merged or `splitonnx merge`",
    )


def write_merged(
    bundle: Source,
    path: str | Path,
    *,
    fold: bool = False,
    raw_states: bool = False,
    overwrite: bool = False,
) -> int:
    """Join the parts of a bundle like :func:`merge`, and write the model to ``path``.

    If the weights are too large for one ONNX file, they are written as external data to a second
    file, whose name is ``path`` with ``.data`` appended.  The weights are streamed, so they do not
    have to fit into memory.  Each file is moved into place only when it is complete, and the model
    file is moved last.  Existing files are replaced only if ``overwrite`` is true.

    Returns:
        The number of bytes written.

    Raises:
        UnwritableFile: a file cannot be written, or exists and must not be replaced.
        BundleError, FormatError, BundleMismatch, UsageError, ModelError: as raised by
            :func:`merge`.
    """
    target = Path(path)
    check_output(target, overwrite=overwrite)
    return write_model(_make_merged(bundle, fold, raw_states), target, overwrite=overwrite)


def write_adapters(
    source: Source,
    path: str | Path,
    *,
    overwrite: bool = False,
) -> int:
    """Write the adapters of a bundle or of an ONNX model, and nothing else, to a file.

    It is a safetensors file with the names and shapes of PEFT's ``adapter_model.safetensors``.
    :func:`splitonnx.adapt` can put its adapters into the original model again.  If other weights
    of a bundle were trained as well, or running statistics were updated, a warning names them.

    Returns:
        The number of bytes written.

    Raises:
        UsageError: the model has no adapters.
        UnwritableFile: the file cannot be written, or exists and must not be replaced.
        BundleError, FormatError, BundleMismatch, ModelError: the source cannot be read.
    """
    target = Path(path)
    check_output(target, overwrite=overwrite)
    model = _open(source, accepts_model=True)
    note = read_note(model)
    if note is None:
        raise UsageError("the model has no adapters to write; splitonnx adapt adds some")
    if note.changed:
        _log.warning(
            "%s changed in training as well, and a file of adapters does not hold that; merge the "
            "whole model to keep it",
            count_some(note.changed),
        )
    return write_note_file(model, note, target)


def collect_weights(bundle: Bundle, *, trained: bool = True) -> dict[str, np.ndarray]:
    """Return the weights of all parties, by name.

    The weights have their trained values or, if ``trained`` is false, their initial values.
    """
    weights: dict[str, np.ndarray] = {}
    for party in bundle.parties.values():
        source = party.state() if trained else party.weights
        roles = {spec.tensor.name: spec.role for spec in party.manifest.state}
        weights |= {n: a for n, a in source.items() if roles[n] is not Role.OPTIMIZER}
    return weights


@attribute_errors_to_pass("given its weights again")
def restore_model(bundle: Bundle, *, trained: bool = True, raw_states: bool = True) -> ir.Model:
    """Return the prepared model: the bundle's skeleton with the weights of all parties inserted.

    The weights have their trained values or, if ``trained`` is false, their initial values.  States
    that the model hands itself are inputs.  If the original model stored an initial value for such
    an input, the value is the one that was kept.  If ``raw_states`` is false, states that hold raw
    inputs have their initial values.

    Raises:
        ModelError: the skeleton is not a valid model.
    """
    model = open_model(bundle.skeleton, is_marked=True)
    weights = collect_weights(bundle, trained=trained)
    if not raw_states:
        initial = collect_weights(bundle, trained=False)
        weights |= {name: initial[name] for name in _list_raw_states(bundle)}
    states = [source for _, source in bundle.manifest.recipe.states]
    restore_weights(model.graph, {n: array for n, array in weights.items() if n not in states})
    for value in [value for value in model.graph.inputs if value.name in states]:
        if value.is_initializer():
            value.const_value = ir.tensor(weights[value.name or ""], name=value.name)
    return model


def _list_raw_states(bundle: Bundle) -> dict[str, tuple[str, ...]]:
    """Map the states that hold raw inputs to these inputs."""
    parties = bundle.parties.values()
    return {n: raw for party in parties for n, raw in party.manifest.raw_states.items()}


def _make_merged(source: Source, fold: bool, raw_states: bool) -> ir.Model:
    model = _open(source, accepts_model=fold, raw_states=raw_states)
    if fold:
        with attribute_errors_to_pass("relieved of its adapters"):
            fold_adapters(model)
    return model


def _open(source: Source, *, accepts_model: bool, raw_states: bool = False) -> ir.Model:
    """Return the joined model of a bundle, or an ONNX model if this is accepted."""
    if isinstance(source, Bundle):
        return _join(source, raw_states)
    if isinstance(source, bytes | onnx.ModelProto) and not accepts_model:
        raise UsageError("this is a model and not a bundle; fold=True folds its adapters")
    if isinstance(source, bytes | onnx.ModelProto) or (accepts_model and Path(source).is_file()):
        return open_model(source)
    return _join(Bundle.load(source), raw_states)


def _note_changes(model: ir.Model, bundle: Bundle) -> None:
    """Note in a model with adapters which of its other weights training changed."""
    note = read_note(model)
    if note is None:
        return
    before, after = collect_weights(bundle, trained=False), collect_weights(bundle)
    roles = [spec for party in bundle.parties.values() for spec in party.manifest.state]
    others = {spec.tensor.name for spec in roles if spec.role in (Role.PARAMETER, Role.BUFFER)}
    others &= {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    changed = [
        name
        for name in after
        if name in others.difference(note.names) and not np.array_equal(after[name], before[name])
    ]
    write_note(model, replace(note, changed=tuple(dict.fromkeys((*note.changed, *changed)))))


@attribute_errors_to_pass("merged")
def _join(bundle: Bundle, raw_states: bool) -> ir.Model:
    bundle.check_steps()
    model = restore_model(bundle, raw_states=raw_states)
    _note_changes(model, bundle)
    make_inference_form(model.graph)
    _drop_losses(bundle, model.graph)
    fold_quantized(model.graph)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():  # such as Dropout's ratio
            model.graph.initializers.pop(name)
    model.producer_name = "splitonnx"
    _say_states(bundle, model.graph, raw_states)
    if (remark := describe_saturation(model.graph)) is not None:
        _log.warning("the merged model: %s", remark)
    return model


def _say_states(bundle: Bundle, graph: ir.Graph, raw_states: bool) -> None:
    """Log warnings that name the states whose values after training are not in the model."""
    states = [source for _, source in bundle.manifest.recipe.states]
    plain = [v.name or "" for v in graph.inputs if v.name in states and not v.is_initializer()]
    if plain and bundle.client.trained is not None:
        _log.warning(
            "the merged model reads %s as data again, as the original does, so it does not hold "
            "what training left there; if the model's file has an initial value for the input, "
            "that is replaced by it (docs/states.md)",
            quote(plain),
        )
    stored = [v.name for v in graph.inputs if v.is_initializer()]
    for name, inputs in _list_raw_states(bundle).items():
        if name in stored and not raw_states and bundle.client.trained is not None:
            _log.warning(
                "the merged model has the initial value of the state '%s', and not that of the "
                "last step, which holds raw input %s of training data; --raw-states "
                "(raw_states=True) writes that instead",
                name,
                quote(inputs),
            )


def _drop_losses(bundle: Bundle, graph: ir.Graph) -> None:
    """Remove the model's own losses, and their labels, if prediction does without them."""
    losses = bundle.manifest.recipe.list_losses()
    names = {loss.output for loss in losses if loss.kind == FROM_MODEL}
    predicted = {spec.name for spec in bundle.client.manifest.outputs}
    if dropped := [name for name in names if name is not None and name not in predicted]:
        drop_losses(graph, dropped)
