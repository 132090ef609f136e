"""Read the original model, and set it to the modes of a bundle, without the preparation passes.

In inference, BatchNormalization uses its running statistics, and Dropout does nothing.  In
training, both use the modes that the user chose.  A MatMulNBits computes with the floats that it is
given, although its accuracy level may allow less.  Everything else stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner

from splitonnx.names import BatchNormModes, DropoutMode
from splitonnx.partitioner.cutting.conformance.dataflow import NotRun, Run, expose, run_session
from splitonnx.partitioner.cutting.conformance.expectations import Expectation, describe_false_size
from splitonnx.partitioner.cutting.conformance.measures import TOLERATED, measure
from splitonnx.partitioner.cutting.passes.joined_statistics import Separation
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.gate.fused_operators import DOMAIN
from splitonnx.partitioner.gate.gates import ModelSource, read_original
from splitonnx.partitioner.gate.walks import list_bodies, list_nodes
from splitonnx.partitioner.graphs.readings import read_model
from splitonnx.partitioner.graphs.transcripts import write_model
from splitonnx.partitioner.normalization.batchnorms import choose_mode
from splitonnx.partitioner.normalization.dequantized.replacements import dequantize
from splitonnx.partitioner.normalization.opsets import adapt_opset, inline_functions

_RANDOM = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)
_REPEATING = frozenset({"Concat", "ConstantOfShape", "Expand", "Tile"})
"""Operators that repeat statistics for each sample; stored running statistics depend on none."""


_PAIRS_WITH_AXES = 13
"""The first opset in which DequantizeLinear has a scale for each channel."""
_TRAINING_MODE = 14
"""The first opset in which BatchNormalization has the attribute ``training_mode``."""


def copy_original(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model in which its functions are inlined."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    while copied.functions:
        _write_defaults(copied)
        copied = _inline_outermost(copied)
    return copied


def _write_defaults(model: onnx.ModelProto) -> None:
    """Give each call of a function in a graph the attributes left to their defaults, in place.

    onnx's inliner leaves these out, so that the nodes inside would have defaults of their own.
    """
    functions = {(each.domain, each.name, each.overload): each for each in model.functions}
    for node in list_nodes(model.graph.node):
        function = functions.get((node.domain, node.op_type, node.overload))
        if function is not None:
            given = {attribute.name for attribute in node.attribute}
            node.attribute.extend(a for a in function.attribute_proto if a.name not in given)


def _inline_outermost(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model without the functions that no other function calls.

    What those pass on to others is known then, also an attribute that they were not given.
    """
    names = {(function.domain, function.name) for function in model.functions}
    called = {
        (node.domain, node.op_type)
        for function in model.functions
        for node in list_nodes(function.node)
    }
    outermost = sorted(names - called) or sorted(names)  # one overload may call another
    inlined: onnx.ModelProto = onnx.inliner.inline_selected_functions(model, outermost)
    left = [each for each in inlined.functions if (each.domain, each.name) not in outermost]
    del inlined.functions[:]
    inlined.functions.extend(left)
    return inlined


def name_source(source: ModelSource) -> str:
    """Return the name of a model for a sentence: its path, if it has one."""
    return str(source) if isinstance(source, str | Path) else "the model"


def read_comparable(
    source: ModelSource, prepared: PreparedModel, most_bytes: int
) -> onnx.ModelProto:
    """Read the original of a prepared model, with the user's adjustments and functions inlined.

    If the user wanted it dequantized, it is returned so.  No kernel rounds activations that the
    model gives as floats (:func:`forbid_rounding`).

    Raises:
        NotRun: the weights take more than ``most_bytes``, or the model draws random numbers.
        NotAModel: the original model can no longer be read.
    """
    if (size := sum(tensor.nbytes for tensor in prepared.weights.values())) > most_bytes:
        raise NotRun(f"its weights take {size / 1e6:,.0f} MB")
    original = copy_original(read_original(source, prepared.adjustments))
    if (node := find_random(original)) is not None:
        raise NotRun(f"node '{node}' draws random numbers")
    forbid_rounding(original)
    return dequantize_original(original) if prepared.adjustments.dequantize else original


def forbid_rounding(model: onnx.ModelProto) -> dict[str, int]:
    """Have each MatMulNBits compute with the floats that it is given, in place.

    Its attribute ``accuracy_level`` allows kernels to round them, to 8 bits if it is 4.  Map the
    nodes that had one to it.
    """
    levels = {}
    for node in _list_packed(model):
        for attribute in [a for a in node.attribute if a.name == "accuracy_level" and a.i]:
            levels[node.name or node.output[0]] = attribute.i
            node.attribute.remove(attribute)
    return levels


def has_packed_weights(model: onnx.ModelProto) -> bool:
    """Return whether a kernel may round activations, because a MatMulNBits reads them."""
    return any(True for _ in _list_packed(model))


def _list_packed(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for node in list_nodes(model.graph.node):
        if node.op_type == "MatMulNBits" and node.domain == DOMAIN:
            yield node


def dequantize_original(original: onnx.ModelProto, *, is_rounding: bool = False) -> onnx.ModelProto:
    """Return a dequantized copy of a model, which still rounds activations if ``is_rounding``."""
    model = read_model(original)
    inline_functions(model)
    dequantize(model, is_rounding=is_rounding)
    if model.opset_imports.get("", 1) < _PAIRS_WITH_AXES:
        adapt_opset(model)
    return write_model(model)


def find_random(model: onnx.ModelProto) -> str | None:
    """Return the name of a node that draws random numbers in inference, or ``None``."""
    for node in list_nodes(model.graph.node):
        if node.op_type in _RANDOM and not node.domain:
            return node.name or node.output[0]
    return None


def find_false_sizes(
    model: onnx.ModelProto, tensors: Mapping[str, np.ndarray]
) -> tuple[str, list[int], list[int]] | None:
    """Return the first of the tensors that has other sizes than a model declares, and both sizes.

    Sizes that are not known are 0 in what is declared.  The first axis may have any size.
    """
    for value in model.graph.value_info:
        if value.name not in tensors or not value.type.tensor_type.HasField("shape"):
            continue
        declared = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        sizes = list(tensors[value.name].shape)
        pairs = list(zip(declared, sizes, strict=False))[1:]
        if len(declared) != len(sizes) or any(own and own != size for own, size in pairs):
            return value.name, declared, sizes
    return None


def refuse_false_sizes(expectation: Expectation, subject: str) -> None:
    """Refuse a model whose results differ if it declares sizes that its tensors do not have.

    What follows from such sizes is computed in advance, so the results are wrong then.
    """
    traced = expose(copy_original(expectation.model))
    with suppress(NotRun):
        run = run_session(traced, expectation.batches[:1], subject, level="none")
        if (found := find_false_sizes(expectation.model, run[0])) is not None:
            name, declared, sizes = found
            raise describe_false_size(f"tensor '{name}' of {subject}", declared, sizes)


def find_first(expectation: Expectation, trace: Run, output: str, subject: str) -> str:
    """Return the name of a model's first tensor that differs from what ``trace`` computes.

    If no tensor differs before the cut, return ``output``, which differs after it.
    """
    traced = expose(copy_original(expectation.model))
    try:
        found = trace(expectation.batches)
        expected = run_session(traced, expectation.batches, subject, level="none")
    except NotRun:
        return output
    for node in expectation.model.graph.node:
        for name in map(str, node.output):
            for want, have in zip(expected, found, strict=True):
                if name in want and name in have and measure(have[name], want[name]) > TOLERATED:
                    return name
    return output


def set_inference_modes(model: onnx.ModelProto) -> None:
    """Set every BatchNormalization and Dropout to inference mode, in place.

    A BatchNormalization without stored running statistics still uses the statistics of its input.
    No statistics are stored if its input does not depend on the data, or if its statistics are
    computed for each sample.
    """
    keeping = _find_without_statistics(model)
    for node in list_nodes(model.graph.node):
        if (
            node.op_type == "BatchNormalization"
            and not node.domain
            and node.output[0] not in keeping
        ):
            _use_running_statistics(model.graph, node)
        if node.op_type == "Dropout" and not node.domain:
            del node.input[2:]


def set_training_modes(
    model: onnx.ModelProto,
    batchnorm: BatchNormModes,
    dropout: DropoutMode | None,
    separations: Sequence[Separation] = (),
) -> bool:
    """Set every BatchNormalization and Dropout to the modes chosen for training, in place.

    Patterns in ``batchnorm`` are compared with the names in the prepared model, in which the
    running statistics in ``separations`` have tensors of their own.

    Return whether the changed model's results can be compared.  They cannot if a Dropout is on, if
    a mode is chosen for a BatchNormalization without a name, or if ``train`` is chosen, but the
    BatchNormalization of the model's opset has no training mode.
    """
    keeping = _find_without_statistics(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    own = {(node, one.index): one.name for one in separations for node in one.nodes}
    opset = next((found.version for found in model.opset_import if not found.domain), 0)
    for node in list_nodes(model.graph.node):
        if node.domain:
            continue
        if node.op_type == "BatchNormalization" and batchnorm and node.output[0] not in keeping:
            read = [own.get((node.name, at), name) for at, name in enumerate(node.input)]
            mode = choose_mode(batchnorm, [node.name, *read[1:], node.output[0]])
            if mode == "frozen":
                _use_running_statistics(model.graph, node)
            elif mode == "train" and opset >= _TRAINING_MODE:
                _set_training(node)
            if (mode == "train" and opset < _TRAINING_MODE) or not node.name:
                return False
        if node.op_type == "Dropout":
            if dropout == "keep" or (dropout is None and _may_drop(node, constants)):
                return False
            del node.input[2:]
    return True


def _may_drop(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    if len(node.input) < 3 or not node.input[2]:
        return False
    known = constants.get(node.input[2])
    return known is None or bool(onnx.numpy_helper.to_array(known).any())


def _set_training(node: onnx.NodeProto) -> None:
    _forget_mode(node)
    node.attribute.append(onnx.helper.make_attribute("training_mode", 1))


def _use_running_statistics(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """Set a node to inference mode; its outputs for new statistics then hold the stored ones."""
    updated = [(old, new) for old, new in zip(node.input[3:5], node.output[1:3], strict=False)]
    del node.output[1:]
    _forget_mode(node)
    for old, new in updated:
        if new:
            graph.node.insert(0, onnx.helper.make_node("Identity", [old], [new]))


def _forget_mode(node: onnx.NodeProto) -> None:
    for attribute in list(node.attribute):
        if attribute.name == "training_mode":
            node.attribute.remove(attribute)


def _find_without_statistics(model: onnx.ModelProto) -> set[str]:
    """Find the BatchNormalization nodes in training mode that have no running statistics.

    Return the names of their first outputs.
    """
    graph = model.graph
    given = {tensor.name for tensor in graph.initializer}
    dependent = {value.name for value in graph.input} - given
    makers: dict[str, onnx.NodeProto] = {}
    found = set()
    for node in graph.node:
        read = {*node.input, *_list_outer(node)}
        if node.op_type == "BatchNormalization" and not node.domain and _is_training(node):
            own = node.input[0] not in dependent
            if own or any(_is_repeated(name, makers) for name in node.input[3:5]):
                found.add(node.output[0])
        if read & dependent:
            dependent.update(node.output)
        makers.update((name, node) for name in node.output if name)
    return found


def _is_training(node: onnx.NodeProto) -> bool:
    return any(a.name == "training_mode" and a.i == 1 for a in node.attribute)


def _list_outer(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names that the subgraphs of a node read."""
    for body in list_bodies(node):
        for inner in list_nodes(body.node):
            yield from inner.input


def _is_repeated(name: str, makers: dict[str, onnx.NodeProto]) -> bool:
    waiting, seen = [name], {name}
    while waiting:
        node = makers.get(waiting.pop())
        if node is None:
            continue
        if node.op_type in _REPEATING:
            return True
        waiting += set(node.input) - seen
        seen.update(node.input)
    return False
