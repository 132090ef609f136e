"""Make padding explicit before any other pass uses it.

onnxruntime-training's ConvGrad ignores ``auto_pad`` and silently computes wrong gradients.  If
``ceil_mode`` is set, ONNX Runtime 1.19.2 makes two errors.  MaxPool computes one window too many if
the last window would start after the end of the image.  AveragePool, contrary to the standard,
counts elements beyond the padding.  If ``pads`` is explicit, all results are correct.  The formulas
are those of Conv-11, MaxPool-12 and AveragePool-19 at onnx.ai/onnx/operators.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_dims
from splitonnx.partitioner.graphs.traversals import list_bodies, list_inputs
from splitonnx.partitioner.inference.folds import note_body_shapes
from splitonnx.partitioner.inference.inferences import Inference
from splitonnx.partitioner.inference.node_faults import attribute_errors_to
from splitonnx.partitioner.inference.shapes import infer_shapes

_WINDOWED = frozenset({"AveragePool", "Conv", "LpPool", "MaxPool"})


_MOST_CORRECTIONS = 32
"""Limit on how often shapes are inferred again because paddings were made explicit."""


def make_all_paddings_explicit(model: ir.Model) -> bool:
    """Set explicit ``pads`` on all convolutions and pooling nodes of a model, in place.

    If this shows that onnx inferred a wrong shape, infer the shapes again and repeat.  Return
    whether this was the case.

    Raises:
        UnsupportedModel: wrong shapes are still found after ``_MOST_CORRECTIONS`` repetitions, or
            ONNX Runtime does not support the padding of a pooling node.
    """
    for index in range(_MOST_CORRECTIONS):
        if not make_paddings_explicit(model.graph):
            return index > 0
        infer_shapes(model)
        note_body_shapes(model.graph, Inference(model.graph.opset_imports[""]))
    raise UnsupportedModel(
        "the model",
        f"more than {_MOST_CORRECTIONS} poolings that round up follow one another, each with "
        "a last window that would begin behind the image",
        "export them with explicit padding",
    )


def make_paddings_explicit(graph: ir.Graph) -> bool:
    """Set explicit ``pads`` on the convolutions and pooling nodes of a graph.

    The nodes of the graph and of its subgraph bodies are changed in place.  A node is left
    unchanged if its padding depends on an unknown size.

    Return whether the caller must infer shapes again and repeat the call.  This is necessary if
    onnx counted one window too many for a node.  All shapes derived from the wrong count are then
    removed, and nodes whose inputs have no shape are left for the next call.

    Raises:
        UnsupportedModel: a pooling node needs padding that ONNX Runtime does not support.
    """
    return _make_paddings_explicit(graph, set())


def _make_paddings_explicit(graph: ir.Graph, wrong: set[ir.Value]) -> bool:
    """Process one graph; collect values whose shape is wrong, also indirectly, in ``wrong``."""
    found = False
    for node in list(graph):
        is_behind = any(value in wrong for value in list_inputs(node))
        for body in list_bodies(node):
            if is_behind:
                _forget_shapes(body.inputs, wrong)
            if _make_paddings_explicit(body, wrong):
                found = is_behind = True
        if not is_behind and node.op_type in _WINDOWED and not node.domain:
            is_behind = _correct(node)
            found = found or is_behind
        if is_behind:
            _forget_shapes(node.outputs, wrong)
    return found


def _correct(node: ir.Node) -> bool:
    """Make the padding of one node explicit; return whether the shape of its output changes."""
    with attribute_errors_to(node, "given explicit padding"):
        counts = _make_padding_explicit(node)
    found = known_dims(node.outputs[0])
    return bool(counts) and found is not None and found[2:] != counts


def _forget_shapes(values: Sequence[ir.Value], wrong: set[ir.Value]) -> None:
    wrong.update(values)
    for value in values:
        value.shape = None


def _make_padding_explicit(node: ir.Node) -> list[int]:
    """Make the padding of one node explicit.

    Return its number of windows per axis if onnx may have counted them wrongly, else an empty list.
    """
    kernel = read_kernel(node)
    if kernel is None:
        return []
    counts: list[int] = []
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    if mode != "NOTSET":
        pads = [0] * (2 * len(kernel)) if mode == "VALID" else _find_pads(node, mode, kernel)
        if pads is not None:
            del node.attributes["auto_pad"]
            node.attributes["pads"] = ir.AttrInt64s("pads", pads)
    elif node.attributes.get_int("ceil_mode", False):
        counts = _make_ceiling_explicit(node, kernel)
    _check_pads(node, kernel)
    return counts


def _check_pads(node: ir.Node, kernel: Sequence[int]) -> None:
    """Raise an error if ONNX Runtime does not support so much padding, which dilations may need."""
    pads = node.attributes.get_ints("pads", [])
    if node.op_type == "Conv" or all(
        pad < k for pad, k in zip(pads, (*kernel, *kernel), strict=False)
    ):
        return
    raise UnsupportedModel(
        f"node '{node.name}' ({node.op_type})",
        f"its windows need a padding of {list(pads)}, and ONNX Runtime takes none as large as its "
        f"kernel, {list(kernel)}",
        "put a Pad before it, or take a window without dilations",
    )


def read_kernel(node: ir.Node) -> list[int] | None:
    """Return the kernel size of a convolution or pooling node, or ``None`` if it is unknown."""
    shape = node.attributes.get_ints("kernel_shape", [])
    if shape:
        return list(shape)
    weights = node.inputs[1] if len(node.inputs) > 1 else None
    dims = known_dims(weights) if weights is not None else None
    if dims is None:
        return None
    kernel = [dim for dim in dims[2:] if dim is not None]
    return kernel if len(kernel) == len(dims) - 2 else None


def count_windows(size: int, reach: int, stride: int, before: int, after: int) -> int:
    """Count the windows of a pooling node with ``ceil_mode`` along an axis of ``size`` elements.

    ``reach`` is the number of elements that a window spans, ``stride`` the distance between the
    starts of two windows, and ``before`` and ``after`` are the widths of the padding at both ends.
    A window that would start in the padding at the end is not counted.
    """
    count = -(-(size + before + after - reach) // stride) + 1
    return count - 1 if (count - 1) * stride >= size + before else count


def _find_pads(node: ir.Node, mode: str, kernel: Sequence[int]) -> list[int] | None:
    dims = known_dims(node.inputs[0]) if node.inputs[0] is not None else None
    sizes = dims[2:] if dims is not None else [None] * len(kernel)
    strides, dilations = _read_steps(node, len(kernel))
    small, large = [], []
    for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        reach = d * (k - 1) + 1
        if n is None and s != 1:
            return None
        total = max(0, (-(-(n or 0) // s) - 1) * s + reach - (n or 0))
        small.append(total // 2)
        large.append(total - total // 2)
    return [*small, *large] if mode == "SAME_UPPER" else [*large, *small]


def _make_ceiling_explicit(node: ir.Node, kernel: Sequence[int]) -> list[int]:
    """Pad as much as the last windows need, drop ``ceil_mode``, and return the window counts.

    Padding that ``ceil_mode`` adds never counts in an average.
    """
    rank = len(kernel)
    dims = known_dims(node.inputs[0]) if node.inputs[0] is not None else None
    if dims is None or None in dims[2:]:
        return []
    strides, dilations = _read_steps(node, rank)
    pads = list(node.attributes.get_ints("pads", [0] * (2 * rank)))
    rests, counts = [], []
    for axis, (k, s, d) in enumerate(zip(kernel, strides, dilations, strict=True)):
        n, reach, before = dims[2 + axis] or 0, d * (k - 1) + 1, pads[axis]
        count = count_windows(n, reach, s, before, pads[rank + axis])
        counts.append(count)
        rests.append((count - 1) * s + reach - n - before - pads[rank + axis])
    included = node.attributes.get_int("count_include_pad", False)
    if included and max(pads) > 0:
        _pad_before(node, pads)
        pads = [0] * (2 * rank)
    if included:
        del node.attributes["count_include_pad"]
    for axis, rest in enumerate(rests):
        pads[rank + axis] = max(0, pads[rank + axis] + rest)
    del node.attributes["ceil_mode"]
    node.attributes["pads"] = ir.AttrInt64s("pads", pads)
    return counts


def _pad_before(node: ir.Node, pads: Sequence[int]) -> None:
    """Add zeros around a node's input with a Pad, so that they count as elements of the input."""
    graph, x = node.graph, node.inputs[0]
    assert graph is not None
    builder, rank = NodeBuilder(f"{node.outputs[0].name}/padded"), len(pads) // 2
    widths = builder.integers([0, 0, *pads[:rank], 0, 0, *pads[rank:]])
    padded = builder.op("Pad", x, widths, mode="constant")
    graph.insert_before(node, builder.nodes)
    node.replace_input_with(0, padded)


def _read_steps(node: ir.Node, rank: int) -> tuple[Sequence[int], Sequence[int]]:
    ones = [1] * rank
    return (
        node.attributes.get_ints("strides", ones),
        node.attributes.get_ints("dilations", ones),
    )
