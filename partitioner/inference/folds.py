"""Fold constants: compute values of a model that do not depend on data.

Values that depend only on constants and fixed dimensions become constants.  The target shape of a
Reshape becomes a constant if at most one dimension is unknown.  Branches and loops whose conditions
and lengths are known are replaced by the nodes that they would run.  A dynamic batch size stays
dynamic.  Weights are graph inputs at this point, so they are not folded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

import numpy as np
import onnx_ir as ir

from splitonnx.errors import SplitonnxError
from splitonnx.expressions import UNKNOWN
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import list_bodies, list_inner, list_inputs, prune
from splitonnx.partitioner.inference.control_flows import KEPT, Unresolved, resolve_control_flow
from splitonnx.partitioner.inference.dimensions import Amount, Dim
from splitonnx.partitioner.inference.inferences import Inference
from splitonnx.partitioner.inference.node_faults import attribute_errors_to


def fold(model: ir.Model, weights: Collection[str]) -> None:
    """Fold the constants of a model, in place.

    ``weights`` names the graph inputs that are not data.  Values keep their names.  The inferred
    dimensions are set on all remaining values, including sums and products of unknown dimensions
    such as ``2*N``.
    """
    graph = model.graph
    known = Inference(graph.opset_imports[""])
    reached = {value for value in graph.inputs if value.name in weights}
    pending, spent = deque(graph), 0
    while pending:
        node = pending.popleft()
        with attribute_errors_to(node, "folded"):
            written = _fold_node(node, known, reached, spent)
        spent += sum(1 + len(list_inner(node)) for node in written)
        pending.extendleft(reversed(written))
    prune(graph)


def _fold_node(
    node: ir.Node, known: Inference, reached: set[ir.Value], spent: int
) -> Sequence[ir.Node]:
    """Fold one node.

    If the node is replaced by other nodes, return them, because they must be folded next.
    """
    trained = any(value in reached for value in list_inputs(node))
    if trained:
        reached.update(node.outputs)
    written = _resolve(node, known, trained, spent)
    if written is not None:
        return written
    _name_type(node)
    known.visit(node)
    _note_carried(node, known.opset)
    for body in list_bodies(node):
        note_body_shapes(body, known)
    _note_ends(node)
    if node.op_type == "Reshape":
        _fix_target(node, known, _fix_reshape)
    elif node.op_type == "Expand":
        _fix_target(node, known, _fix_expand)
    if not _replace_by_constants(node, known):
        for value in node.outputs:
            known.note(value)
    return ()


def note_shapes(graph: ir.Graph) -> None:
    """Infer the dimensions of a graph's values, and set the dimensions that are not set yet."""
    known = Inference(graph.opset_imports[""])
    for node in graph:
        if all(_is_noted(value) for value in node.outputs):
            continue
        known.visit(node)
        for value in node.outputs:
            known.note(value)


def note_body_shapes(body: ir.Graph, known: Inference) -> None:
    """Set the dimensions of a body's values that are not set yet, where they can be inferred.

    ``known`` holds what was inferred of the values around the body.  onnx itself does not know the
    constants among them, and forgets a size that is divided by a factor of it.  Dimensions remain
    unset if their sizes are neither named by the model nor sizes of what the body reads.
    """
    made = {value for node in body for value in node.outputs}
    given = {value for node in body for value in node.inputs if value is not None} - made
    named = {str(dim) for value in given for dim in known.shape(value) or ()}
    for node in body:
        with suppress(SplitonnxError):  # a branch may be wrong for the sizes that it never gets
            known.visit(node)
        _note_carried(node, known.opset)
        for inner in list_bodies(node):
            note_body_shapes(inner, known)
        _note_ends(node)
        for value in node.outputs:
            dims = None if _has_sizes(value) else known.shape(value)
            if dims is not None and named.issuperset(d for d in map(str, dims) if UNKNOWN in d):
                known.note(value)


def _note_carried(node: ir.Node, opset: int) -> None:
    """Give what a Loop carries the shape that it has at first, if each iteration keeps this shape.

    What is carried is assumed to have its first shape.  Assumptions that the body does not preserve
    are dropped, and the others are tried again; those that remain are true.
    """
    if node.op_type != "Loop" or node.domain:
        return
    (body,) = list_bodies(node)
    carried = list(zip(body.inputs[2:], node.inputs[2:], body.outputs[1:], strict=False))
    if all(_has_sizes(before) for before, _, _ in carried):
        return
    given = {before: before.shape for before, _, _ in carried}
    firsts = {before: first.shape for before, first, _ in carried if first is not None}
    assumed = {before: shape for before, shape in firsts.items() if shape is not None}
    while True:
        for before, shape in given.items():
            before.shape = assumed.get(before, shape)
        trial = Inference(opset)
        for inner in body:
            with suppress(SplitonnxError):
                trial.visit(inner)
        changed = [
            before
            for before, _, after in carried
            if before in assumed and trial.shape(before) != trial.shape(after)
        ]
        if not changed:
            return
        for before in changed:
            del assumed[before]


def _note_ends(node: ir.Node) -> None:
    """Set the shapes of what a Loop carries to its end or stacks, if it keeps them in each step."""
    if node.op_type != "Loop" or node.domain:
        return
    (body,) = list_bodies(node)
    carried = len(body.inputs) - 2
    for index, (value, made) in enumerate(zip(node.outputs, body.outputs[1:], strict=False)):
        if value.shape is not None or not _has_sizes(made):
            continue
        if index >= carried:
            value.shape = ir.Shape([None, *(made.shape or ())])
        elif body.inputs[index + 2].shape == made.shape:
            value.shape = made.shape


def _has_sizes(value: ir.Value) -> bool:
    """Return whether all dimensions of a value are set, to numbers or to names."""
    if value.shape is None:
        return False
    dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return not any(dim is None or UNKNOWN in str(dim) for dim in dims)


def _is_noted(value: ir.Value) -> bool:
    """Return whether a value's type and dimensions are complete, so that it can be skipped.

    Integers are never skipped, because they may be sizes.
    """
    if value.dtype in (None, ir.DataType.INT64, ir.DataType.INT32):
        return False
    return _has_sizes(value)


def _resolve(
    node: ir.Node, known: Inference, trained: bool, spent: int
) -> Sequence[ir.Node] | None:
    """Replace control flow by the nodes that it would run, if they are known.

    Loops are replaced only if ``trained`` is set, that is, if a gradient may pass through them.
    """
    loop = node.op_type in ("Loop", "Scan")
    if node.domain or not (node.op_type == "If" or (loop and trained)):
        return None
    try:
        return resolve_control_flow(node, known, spent)
    except Unresolved as reason:
        node.metadata_props[KEPT] = str(reason)
        return None


def _name_type(node: ir.Node) -> None:
    """Make the output type of a GroupNormalization or CastLike explicit.

    onnx does not infer the type of a GroupNormalization.  A CastLike becomes a Cast, so that it no
    longer reads its second input.
    """
    if node.op_type == "GroupNormalization" and node.inputs[0] is not None:
        node.outputs[0].type = node.inputs[0].type
    if node.op_type == "CastLike" and node.inputs[1] is not None:
        dtype = node.inputs[1].dtype
        if dtype is not None:
            node.op_type = "Cast"
            node.attributes["to"] = ir.AttrInt64("to", dtype.value)
            node.resize_inputs(1)


def _replace_by_constants(node: ir.Node, known: Inference) -> bool:
    """Replace a node by constants if all of its outputs are known, and return whether they are."""
    outputs = [value for value in node.outputs if value.uses()]
    if node.op_type == "Constant" or any(value.is_graph_output() for value in node.outputs):
        return False
    contents = [known.constant(value) for value in node.outputs]
    if not outputs or any(not _is_plain(c, v) for c, v in zip(contents, node.outputs, strict=True)):
        return False
    builder = NodeBuilder(f"{node.name}/folded")
    made = [builder.tensor(ir.tensor(np.asarray(content))) for content in contents]
    builder.replace(node, made)
    for value, content in zip(made, contents, strict=True):
        value.shape = ir.Shape(np.asarray(content).shape)  # the declared one may be unknown
    return True


def _is_plain(content: np.ndarray | None, value: ir.Value) -> bool:
    """Return whether ``content`` is known, is numeric, and has the element type of ``value``."""
    if content is None or content.dtype.kind not in "biuf":
        return False
    return value.dtype is None or value.dtype.numpy() == content.dtype


def _fix_target(
    node: ir.Node,
    known: Inference,
    fix: Callable[[ir.Node, list[Amount], list[Amount]], list[int] | None],
) -> None:
    """Replace a node's target shape by a constant if the constant is right for all batch sizes."""
    source, target = node.inputs[0], known.content(node.inputs[1])
    dims = None if source is None else known.shape(source)
    if target is None or target.dtype != object or dims is None:
        return
    wanted = [d if isinstance(d, Dim) else int(d) for d in target.reshape(-1)]
    fixed = fix(node, dims, wanted)
    graph = node.graph
    if fixed is not None and graph is not None:
        builder = NodeBuilder(f"{node.name}/target")
        constant = builder.integers(fixed)
        graph.insert_before(node, builder.nodes)
        node.replace_input_with(1, constant)


def _fix_reshape(node: ir.Node, dims: list[Amount], wanted: list[Amount]) -> list[int] | None:
    """Return a constant target for a Reshape, or ``None`` if more than one dimension is unknown.

    In the target, 0 keeps a dimension of the input, and -1 represents the unknown dimension.
    """
    copying = not node.attributes.get_int("allowzero", 0)
    if 0 in wanted and not copying:
        return None
    fixed = [
        0 if isinstance(dim, Dim) and axis < len(dims) and dims[axis] == dim else dim
        for axis, dim in enumerate(wanted)
    ]
    opened = [-1 if isinstance(dim, Dim) else dim for dim in fixed]
    if opened.count(-1) > 1:
        return None
    node.attributes.pop("allowzero", None)
    return opened


def _fix_expand(_: ir.Node, dims: list[Amount], wanted: list[Amount]) -> list[int] | None:
    """Return a constant target for an Expand, or ``None`` if a new dimension is unknown.

    In the target, 1 keeps a dimension of the input.
    """
    own = [*[1] * (len(wanted) - len(dims)), *dims][-len(wanted) :] if wanted else []
    fixed = [1 if isinstance(d, Dim) and d == o else d for d, o in zip(wanted, own, strict=True)]
    return [d for d in fixed if isinstance(d, int)] if not any(
        isinstance(d, Dim) for d in fixed
    ) else None  # fmt: skip
