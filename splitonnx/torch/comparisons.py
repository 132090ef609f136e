"""Compare an exported model with the network: tensors, modes of layers, and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from splitonnx.errors import WrongExport, quote
from splitonnx.partitioner.cutting.conformance.dataflow import NotRun, run_session
from splitonnx.partitioner.cutting.conformance.measures import measure
from splitonnx.partitioner.cutting.conformance.originals import (
    copy_original,
    find_random,
    set_inference_modes,
    set_training_modes,
)
from splitonnx.partitioner.cutting.conformance.samples import Arrays
from splitonnx.torch.examples import Example
from splitonnx.torch.networks import Layout, without_dropout
from splitonnx.torch.observations import Observation, call
from splitonnx.torch.repairs import is_on

TOLERATED = 1e-3
"""The relative difference above which results count as different."""
_ROUNDING = 1e-6
_RANDOM = frozenset({"Bernoulli", "Dropout", "RandomUniform", "RandomUniformLike"})


def check_tensors(
    network: str,
    model: onnx.ModelProto,
    layout: Layout,
    arrays: Mapping[str, np.ndarray],
    seen: Observation,
) -> None:
    """Check that the model stores the network's tensors under their names, with the same values.

    ``arrays`` maps the names of the network's parameters and buffers to their values, and ``seen``
    describes which of them the network uses.  Tensors that are used must be stored once if they
    require a gradient or are running statistics.

    Raises:
        WrongExport: a tensor is missing or stored twice, or has the wrong shape or values.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    used = {mean.rpartition(".")[0] for mean in (*seen.training, *seen.frozen)}
    needed = [name for name in layout.statistics if name.rpartition(".")[0] in used]
    for name in sorted({*layout.learnt, *needed}):
        group = layout.groups[name]
        present = [other for other in group if other in stored]
        if not present and seen.unused.isdisjoint(group):
            raise WrongExport(network, f"'{name}'", "stored under this name", "missing")
        if len(present) > 1:
            raise WrongExport(network, quote(present), "one tensor", "stored twice, not tied")
    for name in stored.keys() & arrays.keys():
        found = onnx.numpy_helper.to_array(stored[name])
        expected = arrays[name]
        if found.shape != expected.shape:
            shapes = str(list(expected.shape)), str(list(found.shape))
            raise WrongExport(network, f"the shape of '{name}'", *shapes)
        if not np.array_equal(found, expected.astype(found.dtype), equal_nan=True):
            raise WrongExport(network, f"'{name}'", "the network's numbers", "other numbers")


def check_modes(network: str, model: onnx.ModelProto, layout: Layout, seen: Observation) -> None:
    """Check that BatchNormalization and dropout are the same in the model as in the network.

    ``seen`` describes what the network does in training mode.

    Raises:
        WrongExport: the mode or momentum of a BatchNormalization differs, the model has fewer
            dropouts than the network, or the network's results are random but the model has no
            dropout.
    """
    nodes = list(model.graph.node)
    modes = {
        node.input[3]: any(a.name == "training_mode" and a.i for a in node.attribute)
        for node in nodes
        if node.op_type == "BatchNormalization"
    }
    for names, is_training in ((seen.training, True), (seen.frozen, False)):
        for name in sorted(names):
            found = next((modes[other] for other in layout.groups[name] if other in modes), None)
            if found is not is_training:
                module = name.rpartition(".")[0]
                expected = "training mode" if is_training else "inference mode"
                what = "gone" if found is None else "in the other mode"
                raise WrongExport(network, f"BatchNormalization '{module}'", expected, what)
    _check_momenta(network, nodes, layout, seen)
    drops = sum(node.op_type in _RANDOM and is_on(node) for node in nodes)
    if drops < seen.dropouts:
        count = f"{seen.dropouts} or more Dropout nodes"
        raise WrongExport(network, "its dropout", count, f"{drops}")
    if seen.is_random and not drops:
        _refuse_random(network, model)


def _refuse_random(network: str, model: onnx.ModelProto) -> None:
    """Refuse a network whose results are random for another reason than a Dropout."""
    node = find_random(model)
    raise WrongExport(
        network,
        "what is random in training",
        "a dropout",
        f"drawn in node '{node}'" if node is not None else "gone from the file",
        "draw the random numbers outside of the network and pass them to forward as an input, or "
        "use nn.Dropout or F.dropout",
    )


def _check_momenta(
    network: str, nodes: list[onnx.NodeProto], layout: Layout, seen: Observation
) -> None:
    """Check that each batch changes the running statistics as much as in the network.

    PyTorch's momentum is the weight of the batch; ONNX's momentum is the weight of the old value.
    """
    momenta = {
        node.input[3]: next((a.f for a in node.attribute if a.name == "momentum"), 0.9)
        for node in nodes
        if node.op_type == "BatchNormalization"
    }
    for mean, momentum in seen.training.items():
        found = next(momenta[other] for other in layout.groups[mean] if other in momenta)
        if momentum is None or abs(1 - momentum - found) > _ROUNDING:
            what = f"the momentum of BatchNormalization '{mean.rpartition('.')[0]}'"
            expected = "a growing one" if momentum is None else f"{1 - momentum:g}"
            advice = "give the module a momentum, such as 0.1, since ONNX has no cumulative average"
            raise WrongExport(network, what, expected, f"{found:g}", advice)


def compare_results(
    torch: Any,
    network: Any,
    model: onnx.ModelProto,
    example: Example,
    outputs: Sequence[str],
    seen: Observation,
) -> float:
    """Compare the results of the model and of the network, and return the largest difference.

    The results in eval mode are compared for the example and for a batch with one more sample.  If
    the network has a BatchNormalization in training mode, the results in training mode are also
    compared, for the example and without dropout.  The second comparison is skipped if the results
    are random even without dropout.  ``outputs`` are the names of the model's outputs.

    Pass the network in the modes in which it is trained.  This function changes its modes and its
    running statistics.

    Raises:
        WrongExport: an output differs, the model draws random numbers in eval mode, or it cannot
            be run.
    """
    original = copy_original(model)
    set_inference_modes(original)
    batches = [example, example.resize(example.batch + 1)]
    if (node := find_random(original)) is not None:
        raise WrongExport(
            type(network).__name__,
            "eval mode",
            "free of random numbers",
            f"drawn in node '{node}'",
            "PyTorch's exporters write only nn.Dropout and its function as a dropout that can be "
            "turned off: use these in place of Dropout2d and the like",
        )
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    expected = [_call(torch, network, batch, outputs) for batch in batches]
    largest = _compare(network, original, batches, expected, "eval")
    if not seen.training:
        return largest
    for module, mode in modes:  # last, since it updates running statistics
        module.training = mode
    return max(largest, _compare_training(torch, network, model, example, outputs))


def _call(torch: Any, network: Any, example: Example, names: Sequence[str]) -> Arrays:
    return dict(zip(names, call(torch, network, example).values(), strict=True))


def _compare_training(
    torch: Any, network: Any, model: onnx.ModelProto, example: Example, outputs: Sequence[str]
) -> float:
    original = copy_original(model)
    is_set = set_training_modes(original, None, "off")
    with without_dropout(torch, network):
        first, second = (_call(torch, network, example, outputs) for _ in range(2))
    is_random = any(not np.array_equal(first[n], second[n], equal_nan=True) for n in first)
    if not is_set or is_random or find_random(original) is not None:
        return 0.0
    return _compare(network, original, [example], [first], "training")


def _compare(
    network: Any,
    model: onnx.ModelProto,
    batches: list[Example],
    expected: list[Arrays],
    mode: str,
) -> float:
    name, largest = type(network).__name__, 0.0
    read = {value.name for value in model.graph.input}
    given = [
        {key: tensor.detach().cpu().numpy() for key, tensor in batch.tensors.items() if key in read}
        for batch in batches
    ]
    try:
        found = run_session(model.SerializeToString(), given, name, level="none")
    except NotRun as error:
        batch = " or ".join(str(one.batch) for one in batches)
        raise WrongExport(
            name,
            f"{mode} mode with {batch} samples",
            "the network's results",
            f"an error ({error})",
        ) from error
    for one, want, have in zip(batches, expected, found, strict=True):
        for output, array in want.items():
            size = measure(have[output], array)
            if not size <= TOLERATED:
                raise WrongExport(
                    name,
                    f"output '{output}' in {mode} mode with {one.batch} samples",
                    "the network's",
                    f"another one by {size:.1e}",
                    "the exporter may have written a choice or a size of the example as a constant",
                )
            largest = max(largest, float(size))
    return largest
