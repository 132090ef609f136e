"""Remove a fixed batch size of 1 from a model, or find the node that fixes a batch size.

An exporter that traces a model with one sample may write the batch size, 1, into the target shape
of a Reshape, or into a constant that is combined with the data.  The model then accepts only one
sample, although its inputs are declared with a batch of any size.  Such a 1 is replaced by the
batch size of the data if it cannot mean anything else: the changed model then computes the same
for one sample, and the unchanged model could not run with more.  Only the operators in
:data:`JOINING` could: a Resize would make one sample of all, and an AffineGrid would drop all but
one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import onnx_ir as ir

from splitonnx.errors import quote
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array
from splitonnx.partitioner.graphs.traversals import find_dependents, walk_back
from splitonnx.partitioner.normalization.recurrence_layouts import FIRST_STATES

MOST_ROUNDS = 64
"""The limit on how often shapes are inferred again after a fixed batch size was removed."""

MOST_NAMED = 8
"""The largest number of nodes that a sentence names."""

JOINING = frozenset(["AffineGrid", "Resize"])
"""Operators that run with several samples although their constant sizes are those of one."""

_FIXING = frozenset(
    ["CenterCropPad", "Concat", "Expand", "GRU", "Gather", "LSTM", "RNN", "Reshape", "Slice",
     "Split", "Tile"]
)  # fmt: skip
"""Operators that can fix a batch size; a reduction of the batch to one loss is not among them."""


def free_batches(
    graph: ir.Graph, weights: Collection[str], chosen: Collection[int] = ()
) -> list[str]:
    """Replace each fixed 1 that can only be the batch size by that of the data, in place.

    ``weights`` names the graph inputs that are not data.  A batch has any size, or one of the sizes
    in ``chosen``, which the user gave the inputs.  Return the names of the changed nodes.
    The shapes of their outputs, and of all tensors that depend on these, are cleared and have to be
    inferred again.  A further call may then find more nodes.
    """
    symbols = _list_sizes(graph, weights, chosen)
    if not symbols:
        return []
    changed = [node for node in list(graph) if _free(graph, node, symbols)]
    _forget_shapes(graph, changed)
    return [node.name or "" for node in changed]


def describe_freed(nodes: Sequence[str]) -> str:
    """Return a sentence about nodes that had a batch of 1; it is empty if there are no nodes."""
    if not nodes:
        return ""
    return (
        f"{quote(nodes[:MOST_NAMED])} {'have' if len(nodes) > 1 else 'has'} a batch of 1 in the "
        "model's file, and could keep no other; it is taken for the batch of the data"
    )


def find_fixing_node(graph: ir.Graph, weights: Collection[str], output: str) -> str:
    """Return a sentence about the node that fixes the batch size of the output named ``output``.

    ``weights`` names the graph inputs that are not data.  Return an empty string if the batch size
    is not fixed, or if no such node is found.
    """
    ends = [value for value in graph.outputs if value.name == output]
    size = _read_first(ends[0]) if ends else None
    if not isinstance(size, int):
        return ""
    symbols, reached = _list_sizes(graph, weights), walk_back(ends)[0]
    for node in graph:
        is_after_batch = any(_is_batch(value, symbols) for value in node.inputs)
        is_fixing = node.op_type in _FIXING and _read_first(node.outputs[0]) == size
        if is_fixing and is_after_batch and node in reached:
            return f"the batch is fixed at {size} by node '{node.name}' ({node.op_type})"
    return ""


def _list_sizes(
    graph: ir.Graph, weights: Collection[str], chosen: Collection[int] = ()
) -> set[int | str]:
    """List the first dimensions of the inputs that are data, if they are open or in ``chosen``."""
    firsts = [_read_first(value) for value in graph.inputs if value.name not in weights]
    return {f for f in firsts if isinstance(f, str) or (f is not None and f in chosen)}


def _read_first(value: ir.Value | None, axis: int = 0) -> int | str | None:
    if value is None or value.shape is None or len(value.shape) <= axis:
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else dim.value


def _is_batch(value: ir.Value | None, sizes: Collection[int | str], axis: int = 0) -> bool:
    return _read_first(value, axis) in sizes


def _free(graph: ir.Graph, node: ir.Node, symbols: Collection[int | str]) -> bool:
    if node.domain:
        return False
    if node.op_type == "Reshape":
        return _free_reshape(graph, node, symbols)
    if node.op_type == "Resize":
        return _free_resize(graph, node, symbols)
    if node.op_type == "AffineGrid":
        return _free_affine_grid(graph, node)
    if node.op_type == "GridSample" and _is_batch(node.inputs[0], symbols):
        return _repeat(graph, node, [1], node.inputs[0], 0, 0)
    if node.op_type == "Concat" and node.attributes.get_int("axis", 0) > 0:
        beside = next((value for value in node.inputs if _is_batch(value, symbols)), None)
        return _repeat(graph, node, range(len(node.inputs)), beside, 0, 0)
    states = FIRST_STATES.get(node.op_type, ())
    sequence = node.inputs[0] if states else None
    if not _is_batch(sequence, symbols, 1):
        return False
    return _repeat(graph, node, states, sequence, 1, 1)


def _free_reshape(graph: ir.Graph, node: ir.Node, symbols: Collection[int | str]) -> bool:
    """Make a Reshape to ``[1, ...]`` keep the batch if no sample loses or gains elements.

    Return whether the node was changed.  Without a -1 in its shape, it could run for no other batch
    size.  With a -1 it could, so the next node must accept only the size that one sample gives it.
    """
    data, target = node.inputs[0], known_array(node.inputs[1])
    if target is None or target.ndim != 1 or not target.size or node.attributes.get("allowzero"):
        return False
    if int(target[0]) != 1 or not _is_batch(data, symbols):
        return False
    assert data is not None
    assert data.shape is not None
    sizes = [dim for dim in data.shape[1:] if isinstance(dim, int)]
    if len(sizes) < len(data.shape) - 1:
        return False
    rest = [int(size) for size in target[1:]]
    if any(not size and index + 1 >= len(data.shape) for index, size in enumerate(rest)):
        return False
    rest = [size or sizes[index] for index, size in enumerate(rest)]
    elements, known = math.prod(sizes), math.prod(size for size in rest if size != -1)
    if -1 in rest:
        if not known or elements % known or not _is_tied(node, rest, elements // known):
            return False
    elif known != elements:
        return False
    builder = NodeBuilder(f"{node.outputs[0].name}/batch")
    node.replace_input_with(1, builder.integers([0, *rest]))
    graph.insert_before(node, builder.nodes)
    return True


def _free_resize(graph: ir.Graph, node: ir.Node, symbols: Collection[int | str]) -> bool:
    """Make a Resize to one sample resize the other axes only, and return whether it was changed.

    With a larger batch, it would replace all samples by one or compute a mean of them.
    """
    data, sizes = node.inputs[0], known_array(node.inputs[3]) if len(node.inputs) > 3 else None
    if sizes is None or not _is_batch(data, symbols):
        return False
    assert data is not None
    assert data.shape is not None
    rank = len(data.shape)
    axes = [axis % rank for axis in node.attributes.get_ints("axes", range(rank))]
    after = dict(zip(axes, map(int, sizes), strict=True))
    plain = node.attributes.get_string("keep_aspect_ratio_policy", "stretch") == "stretch"
    coordinates = node.attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if after.pop(0, None) != 1 or not after or not plain or coordinates == "tf_crop_and_resize":
        return False
    node.attributes.add(ir.AttrInt64s("axes", list(after)))
    builder = NodeBuilder(f"{node.outputs[0].name}/batch")
    node.replace_input_with(3, builder.integers(list(after.values())))
    graph.insert_before(node, builder.nodes)
    return True


def _free_affine_grid(graph: ir.Graph, node: ir.Node) -> bool:
    """Make an AffineGrid for one sample compute a grid for each, and return whether it changed.

    The operator requires as many transforms as samples, so their number need not be a batch's name.
    """
    transforms, sizes = node.inputs[0], known_array(node.inputs[1])
    if transforms is None or transforms.shape is None or isinstance(transforms.shape[0], int):
        return False
    if sizes is None or not sizes.size or int(sizes[0]) != 1:
        return False
    builder = NodeBuilder(f"{node.outputs[0].name}/batch")
    rows = builder.op("Shape", transforms, start=0, end=1)
    rest = builder.integers([int(size) for size in sizes[1:]])
    node.replace_input_with(1, builder.op("Concat", rows, rest, axis=0))
    graph.insert_before(node, builder.nodes)
    return True


def _is_tied(node: ir.Node, rest: Sequence[int], size: int) -> bool:
    """Return whether the -1 is the last axis, and a product that reads it accepts only ``size``."""
    if rest[-1] != -1:
        return False
    for use in node.outputs[0].uses():
        product, index = use.node, use.idx
        if product.op_type not in ("Gemm", "MatMul") or product.domain or index != 0:
            continue
        turned = product.attributes.get_int("transB", 0)
        if product.attributes.get_int("transA", 0):
            continue
        other = product.inputs[1]
        rank = 0 if other is None or other.shape is None else len(other.shape)
        if rank > 1 and _read_first(other, rank - 1 if turned else rank - 2) == size:
            return True
    return False


def _repeat(
    graph: ir.Graph,
    node: ir.Node,
    indices: Collection[int],
    beside: ir.Value | None,
    axis: int,
    place: int,
) -> bool:
    """Expand inputs whose ``axis`` has size 1 to the size of ``beside`` on its axis ``place``.

    The node requires these two sizes to be equal.  Return whether an input was expanded.
    """
    found = False
    for index in indices:
        value = node.inputs[index] if index < len(node.inputs) else None
        if beside is None or value is None or _read_first(value, axis) != 1:
            continue
        assert value.shape is not None
        builder = NodeBuilder(f"{node.outputs[0].name or node.name}/batch{index}")
        rows = builder.op("Shape", beside, start=place, end=place + 1)
        before, after = [1] * axis, [1] * (len(value.shape) - axis - 1)
        parts = [builder.integers(before)] if before else []
        parts += [rows, *([builder.integers(after)] if after else [])]
        shape = builder.op("Concat", *parts, axis=0) if len(parts) > 1 else rows
        repeated = builder.op("Expand", value, shape)
        if beside.shape is not None:  # inference alone would not find the batch's name
            dims: list[int | ir.SymbolicDim] = [*value.shape]
            dims[axis] = beside.shape[place]
            repeated.type, repeated.shape = value.type, ir.Shape(dims)
        node.replace_input_with(index, repeated)
        graph.insert_before(node, builder.nodes)
        found = True
    return found


def _forget_shapes(graph: ir.Graph, changed: Sequence[ir.Node]) -> None:
    made = [value for node in changed for value in node.outputs]
    for value in {*made, *find_dependents(graph, made)}:
        value.shape = None
