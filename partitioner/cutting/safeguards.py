"""Add checks before operators whose kernels in ONNX Runtime 1.19 do not validate their inputs.

Some kernels crash the process, or read outside a tensor, if a dimension is 0, if two dimensions
that should be equal differ, or if a label is not a valid class index.  Sizes that the parties agree
on (:mod:`splitonnx.tensors`) are at least 1, and equal if their names are equal.  All other sizes
are checked while the graph runs.  The checks are made of standard operators: Gather raises an error
if an index is out of range, and Reshape raises an error if the number of elements differs.

Checks are added once the ports, the nodes that mark the tensors to send, are in place.  Each check
is therefore run by the party that runs the kernel, and no additional tensor is sent.  Checks are
added before differentiation, and also inside the subgraph bodies of control-flow nodes.  Kernels
that compute addresses from values are handled in :mod:`addresses`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.expressions import UNKNOWN, is_quotient
from splitonnx.partitioner.cutting.addresses import ADDRESS_CHECKS
from splitonnx.partitioner.graphs.assertions import (
    check_lengths,
    known_sizes,
    note,
    pass_if,
    refuse_where,
    require_rank,
    reshape,
)
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.traversals import list_bodies
from splitonnx.partitioner.inference.dimensions import Amount, list_terms, parse_dim
from splitonnx.partitioner.inference.node_faults import attribute_errors_to
from splitonnx.partitioner.normalization.explicit_padding import read_kernel

_SMALLEST = {ir.DataType.INT64: -(1 << 63), ir.DataType.INT32: -(1 << 31)}
"""Map the integer types that processors divide directly to their smallest integer.

Integers of other types are converted to a wider type before they are divided.
"""
_INTEGERS = {
    *_SMALLEST,
    ir.DataType.INT8,
    ir.DataType.INT16,
    ir.DataType.UINT8,
    ir.DataType.UINT16,
    ir.DataType.UINT32,
    ir.DataType.UINT64,
}

WINDOW = "image_must_be_as_large_as_the_window"
"""End of the name of the node that fails over an image that is too small to be pooled."""

Check = Callable[[NodeBuilder, ir.Node], Mapping[int, ir.Value]]


def add_safeguards(graph: ir.Graph, nodes: Collection[ir.Node], *, is_training: bool) -> None:
    """Insert checks before each node in ``nodes`` that needs them.

    ``is_training`` means that the graph will be differentiated; checks are then also inserted for
    the gradient kernels, and none for the kernels of optimized graphs, which only predict.
    """
    tables = [_CHECKS, ADDRESS_CHECKS, _TRAINING_CHECKS if is_training else _PREDICTION_CHECKS]
    for node in [node for node in graph if node in nodes]:
        for body in list_bodies(node):
            add_safeguards(body, set(body), is_training=is_training)
        if node.domain not in ("", "ai.onnx"):
            continue
        checks = [table[node.op_type] for table in tables if node.op_type in table]
        work = "guarded against data that crash its kernel"
        with attribute_errors_to(node, work, is_valid=True):
            _insert(graph, node, checks)


def _insert(graph: ir.Graph, node: ir.Node, checks: Sequence[Check]) -> None:
    builder = NodeBuilder(f"{node.outputs[0].name or node.name}/checked")
    for check in checks:
        for index, value in check(builder, node).items():
            node.replace_input_with(index, value)
    graph.insert_before(node, builder.nodes)


def is_bound(amount: Amount) -> bool:
    """Return whether a dimension is certain to be at least 1 whenever the graph runs.

    This is true for positive numbers, and for sums of products of named sizes that the parties
    agree on.
    """
    return amount != 0 and all(
        factor > 0 and not any(UNKNOWN in atom or is_quotient(atom) for atom in atoms)
        for atoms, factor in list_terms(amount)
    )


def _check_gather(builder: NodeBuilder, node: ir.Node) -> dict[int, ir.Value]:
    """Check that a GatherND's data and indices have equal batch dimensions, none of them empty."""
    count = node.attributes.get_int("batch_dims", 0)
    data, indices = node.inputs[:2]
    if not count or data is None or indices is None:
        return {}
    tied, own = _list_dims(data, count), _list_dims(indices, count)
    if tied == own and all(dim is not None and is_bound(dim) for dim in tied):
        return {}
    rank = require_rank(indices)
    sizes = _check_sizes(builder, data, count)
    sizes = builder.op("Gather", sizes, builder.integers([min(i, count - 1) for i in range(rank)]))
    tied_axes = builder.array(np.arange(rank) < count, ir.DataType.BOOL)
    shape = builder.op("Where", tied_axes, sizes, builder.op("Shape", indices))
    return {1: reshape(builder, indices, shape)}


def _check_rows(builder: NodeBuilder, node: ir.Node) -> dict[int, ir.Value]:
    """Check that a convolution gets at least one image: its gradient divides by the number."""
    return _check_filled(builder, node, [0], 1)


def _check_operands(builder: NodeBuilder, node: ir.Node) -> dict[int, ir.Value]:
    """Check that no operand is empty, because Einsum would read beyond an empty tensor."""
    return _check_filled(builder, node, range(len(node.inputs)), None)


def _check_source(builder: NodeBuilder, node: ir.Node) -> dict[int, ir.Value]:
    """Check that the input of a mean is not empty: its gradient divides by the result's size."""
    return _check_filled(builder, node, [0], None)


def _check_divisor(builder: NodeBuilder, node: ir.Node) -> dict[int, ir.Value]:
    """Check that no integer is divided by 0, and that the smallest integer is not divided by -1.

    Either would crash the process.  The divisor ``d`` of ``n`` is replaced by
    ``d + [0][d = 0 or (d = -1 and n = smallest)]``: the lookup adds 0, or fails at index 1.
    """
    number, divisor = node.inputs[:2]
    if number is None or divisor is None:
        return {}
    if divisor.dtype is None:
        raise UnsupportedModel(
            f"tensor '{divisor.name}'", "its type is not known", "export the model with types"
        )
    if divisor.dtype not in _INTEGERS:
        return {}
    smallest = _SMALLEST.get(divisor.dtype)
    constant = ir.convenience.get_const_tensor(divisor)
    if constant is not None:
        values = constant.numpy()
        if values.all() and (smallest is None or not (values == -1).any()):
            return {}
    wide = builder.cast(divisor, ir.DataType.INT64)
    bad = builder.op("Equal", wide, builder.integer(0))
    shape = divisor.shape
    if smallest is not None:
        overflows = builder.op(
            "And",
            builder.op("Equal", wide, builder.integer(-1)),
            builder.op("Equal", builder.cast(number, ir.DataType.INT64), builder.integer(smallest)),
        )
        bad, shape = builder.op("Or", bad, overflows), None
    index = builder.cast(note(bad, ir.DataType.BOOL), ir.DataType.INT64)
    zeros = note(builder.op("Gather", builder.integers([0]), index, axis=0), ir.DataType.INT64)
    if divisor.dtype in _SMALLEST:
        checked = builder.op("Add", divisor, builder.cast(zeros, divisor.dtype))
    else:  # Add has no kernel for small integers
        checked = builder.cast(
            note(builder.op("Add", wide, zeros), ir.DataType.INT64), divisor.dtype
        )
    return {1: note(checked, divisor.dtype, shape)}


def _check_lengths(builder: NodeBuilder, node: ir.Node) -> dict[int, ir.Value]:
    """Check the lengths of an LSTM, GRU or RNN that is not rewritten as a Scan, which checks them.

    Raises:
        UnsupportedModel: the lengths are constants, and one of them is not allowed.
    """
    lengths = node.inputs[4] if len(node.inputs) > 4 else None
    return {} if lengths is None else {4: check_lengths(builder, node, lengths)}


def _check_diagonal(builder: NodeBuilder, node: ir.Node) -> dict[int, ir.Value]:
    """Limit a diagonal's offset to a range for which addresses can be computed."""
    diagonal = node.inputs[1] if len(node.inputs) > 1 else None
    if diagonal is None or diagonal.is_initializer():
        return {}
    bound = 1 << 31
    lowered = builder.op("Min", diagonal, builder.integer(bound))
    bounded = builder.op("Max", note(lowered, ir.DataType.INT64), builder.integer(-bound))
    return {1: note(bounded, ir.DataType.INT64, diagonal.shape)}


def _check_windows(builder: NodeBuilder, node: ir.Node) -> dict[int, ir.Value]:
    """Check that an image is at least as large as one window of a pooling node.

    Of a smaller image, the result has no rows.  Beside a convolution, ONNX Runtime runs poolings of
    two axes by a kernel of its own (NCHWc), which then divides by their number.
    """
    image, kernel = node.inputs[0], read_kernel(node)
    if image is None or kernel is None or len(kernel) != 2:
        return {}
    least = _list_least(node, kernel)
    dims = _list_dims(image, None)[2:] or [None] * len(least)
    if max(least) <= 1:  # no convolution gives an image without rows
        return {}
    if all(dim is not None and _reaches(dim, size) for dim, size in zip(dims, least, strict=True)):
        return {}
    shape = note(builder.op("Shape", image), ir.DataType.INT64)
    zero = refuse_where(builder, builder.op("Less", shape, builder.integers([0, 0, *least])))
    refusing = zero.producer()
    assert refusing is not None
    refusing.name = f"{node.name or node.outputs[0].name}/{WINDOW}"
    return {0: pass_if(builder, image, zero)}


def _list_least(node: ir.Node, kernel: Sequence[int]) -> list[int]:
    """List the smallest size of an image, on each axis, of which a pooling node has a result."""
    rank = len(kernel)
    if node.attributes.get_string("auto_pad", "NOTSET").startswith("SAME"):
        return [1] * rank
    pads = node.attributes.get_ints("pads", [0] * (2 * rank))
    strides = node.attributes.get_ints("strides", [1] * rank)
    dilations = node.attributes.get_ints("dilations", [1] * rank)
    rounds_up = node.attributes.get_int("ceil_mode", 0)
    return [
        dilations[axis] * (size - 1)
        + 1
        - pads[axis]
        - pads[rank + axis]
        - (strides[axis] - 1 if rounds_up else 0)
        for axis, size in enumerate(kernel)
    ]


def _reaches(amount: Amount, least: int) -> bool:
    """Return whether a dimension is certain to be at least ``least`` whenever the graph runs."""
    return is_bound(amount) and sum(factor for _, factor in list_terms(amount)) >= least


def _check_filled(
    builder: NodeBuilder, node: ir.Node, operands: Sequence[int], count: int | None
) -> dict[int, ir.Value]:
    """Check that the first ``count`` dimensions of each operand are at least 1.

    No check is added if this is already known.
    """
    checked = {}
    for index in operands:
        value = node.inputs[index]
        if value is None or value.is_initializer():
            continue
        dims = _list_dims(value, count)
        if dims and all(dim is not None and is_bound(dim) for dim in dims):
            continue
        checked[index] = reshape(builder, value, _check_sizes(builder, value, count))
    return checked


def _check_labels(builder: NodeBuilder, node: ir.Node) -> dict[int, ir.Value]:
    """Check that each label is a class or the ignored label, and that each class has a weight.

    For ``C`` classes, labels are looked up as ``range(C)[labels < 0 ? C : labels]``.  This returns
    the same labels, or fails if a label is not a class.
    """
    scores, labels = node.inputs[:2]
    if scores is None or labels is None or labels.dtype is None:
        return {}
    index = builder.cast(labels, ir.DataType.INT64)
    ignored = node.attributes.get("ignore_index")
    skipped = None
    if ignored is not None:
        skipped = builder.op("Equal", index, builder.integer(ignored.as_int()))
        index = builder.op("Where", skipped, builder.integer(0), index)
    count = builder.op("Squeeze", builder.shape(scores, 1, 2))
    negative = builder.op("Less", index, builder.integer(0))
    classes = builder.op("Range", builder.integer(0), count, builder.integer(1))
    checked = builder.op("Gather", classes, builder.op("Where", negative, count, index), axis=0)
    if skipped is not None and ignored is not None:
        checked = builder.op("Where", skipped, builder.integer(ignored.as_int()), checked)
    checked = builder.cast(note(checked, ir.DataType.INT64, labels.shape), labels.dtype)
    dims = _list_dims(labels, None)
    if not dims or not all(dim is not None and is_bound(dim) for dim in dims):
        checked = reshape(builder, note(checked, labels.dtype), _check_sizes(builder, labels, None))
    weights = node.inputs[2] if len(node.inputs) > 2 else None
    labelled = {1: note(checked, labels.dtype, labels.shape)}
    if weights is None or known_sizes(weights) == (known_sizes(scores, 1, 2) or []):
        return labelled
    return {**labelled, 2: reshape(builder, weights, builder.shape(scores, 1, 2))}


def _check_sizes(builder: NodeBuilder, value: ir.Value, count: int | None) -> ir.Value:
    """Build a value's shape in a way that fails if one of the first ``count`` dimensions is empty.

    Each size is looked up in the shape at its index.  If the size is 0, the number of dimensions is
    added to the index, which is then out of range.  Concat is not used: ONNX Runtime turns a Concat
    before a Reshape into a constant that contains -1, which matches any size.
    """
    shape = note(builder.op("Shape", value), ir.DataType.INT64)
    length, zero, one = builder.op("Size", shape), builder.integer(0), builder.integer(1)
    places = builder.op("Range", zero, length, one)
    empty = builder.op("Sub", one, builder.op("Min", shape, one))
    if count is not None:
        first = builder.op("Less", places, builder.integer(count))
        empty = builder.op("Where", first, empty, zero)
    index = builder.op("Add", places, builder.op("Mul", empty, length))
    return note(builder.op("Gather", shape, index, axis=0), ir.DataType.INT64)


def _list_dims(value: ir.Value, count: int | None) -> list[Amount | None]:
    """List a value's first ``count`` dimensions, with ``None`` for each unknown dimension."""
    if value.shape is None:
        return [None]
    return [
        dim if isinstance(dim, int) else parse_dim(dim.value) if dim.value else None
        for dim in list(value.shape)[:count]
    ]


_CHECKS: Mapping[str, Check] = {
    "Div": _check_divisor,
    "Einsum": _check_operands,
    "GRU": _check_lengths,
    "GatherND": _check_gather,
    "LSTM": _check_lengths,
    "Mod": _check_divisor,
    "RNN": _check_lengths,
    "SoftmaxCrossEntropyLoss": _check_labels,
    "Trilu": _check_diagonal,
}
_TRAINING_CHECKS: Mapping[str, Check] = {"Conv": _check_rows, "ReduceMean": _check_source}
_PREDICTION_CHECKS: Mapping[str, Check] = {"AveragePool": _check_windows, "MaxPool": _check_windows}
