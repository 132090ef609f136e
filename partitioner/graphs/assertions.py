"""Build assertions from standard operators: nodes that stop a graph's run if a condition is true.

The assertions use Gather, which raises an error if an index is out of range: each assertion
computes an index that is out of range if its condition is true.  The protected kernel reads a value
that depends on the Gather, so the run stops before the kernel is called.  :mod:`safeguards` and
:mod:`addresses` decide which kernels need assertions.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array

I64, BOOL = ir.DataType.INT64, ir.DataType.BOOL

LENGTHS = "sequence_lens_must_be_1_to_steps"
"""End of the name of the node that fails over the lengths of sequences."""


def refuse_where(builder: NodeBuilder, bad: ir.Value) -> ir.Value:
    """Build a node that fails if any element of the boolean tensor ``bad`` is true.

    Return the node's output, which is the int64 scalar 0 if the node does not fail.  The caller
    must pass this output to :func:`pass_if`.
    """
    numbers = builder.cast(note(bad, BOOL), I64)
    count = builder.op("ReduceSum", numbers, keepdims=0)  # ReduceMax would refuse an empty tensor
    return note(builder.op("Gather", builder.integers([0]), note(count, I64), axis=0), I64)


def pass_if(builder: NodeBuilder, value: ir.Value, zero: ir.Value) -> ir.Value:
    """Build a copy of ``value`` that is computed only if an assertion passes.

    ``zero`` is the output of :func:`refuse_where`.  It is added to the copy's shape, so that the
    copy depends on the assertion.
    """
    shape = note(builder.op("Shape", value), I64)
    return reshape(builder, value, note(builder.op("Add", shape, zero), I64))


def reshape(builder: NodeBuilder, value: ir.Value, shape: ir.Value) -> ir.Value:
    """Build a Reshape that fails unless ``value`` has as many elements as ``shape`` describes.

    If the node does not fail, ``shape`` must be equal to the shape of ``value``, because the result
    gets the declared shape of ``value``.
    """
    return note(builder.op("Reshape", value, shape), value.dtype, value.shape)


def either(builder: NodeBuilder, *conditions: ir.Value) -> ir.Value:
    """Build a condition that is true if any of ``conditions`` is true."""
    joined, *others = conditions
    for condition in others:
        joined = note(builder.op("Or", joined, condition), BOOL)
    return joined


def note(value: ir.Value, dtype: ir.DataType | None, shape: ir.Shape | None = None) -> ir.Value:
    """Set the declared type and shape of a value, and return the value."""
    value.type = None if dtype is None else ir.TensorType(dtype)
    value.shape = shape
    return value


def require_rank(value: ir.Value) -> int:
    """Return a value's number of dimensions.

    Raises:
        UnsupportedModel: the number is not known.
    """
    if value.shape is None:
        raise UnsupportedModel(
            f"tensor '{value.name}'", "its rank is not known", "export the model with shapes"
        )
    return len(value.shape)


def known_sizes(value: ir.Value, start: int = 0, end: int | None = None) -> list[int] | None:
    """Return the dimensions ``start:end`` of a value, or ``None`` if any of them is unknown."""
    if value.shape is None:
        return None
    dims = list(value.shape)[start:end]
    sizes = [dim for dim in dims if isinstance(dim, int)]
    return sizes if len(sizes) == len(dims) else None


def check_lengths(builder: NodeBuilder, node: ir.Node, lengths: ir.Value) -> ir.Value:
    """Check that the sequences of an LSTM, GRU or RNN have lengths from 1 to the number of steps.

    What an empty sequence gives is not defined: a Scan hands on its initial state, and the kernels
    of ONNX Runtime give zeros or uninitialized memory.  The name of the node that fails tells what
    is allowed.  Return the checked lengths, or ``lengths`` if they need no check or have one.

    Raises:
        UnsupportedModel: the lengths are constants, and one of them is not allowed.
    """
    if _are_checked(lengths):
        return lengths
    x = node.inputs[0]
    assert x is not None
    steps, batch = (1, 0) if node.attributes.get_int("layout", 0) else (0, 1)
    known, size = known_array(lengths), known_sizes(x, steps, steps + 1)
    if known is not None and ((known < 1).any() or (size and (known > size[0]).any())):
        raise UnsupportedModel(
            f"node '{node.name}' ({node.op_type})",
            f"its sequence_lens are {known.min()} to {known.max()}, and not 1 to the number of "
            "steps",
            "leave out empty sequences, or give them the length 1",
        )
    if known is not None and size:
        return lengths
    wide = builder.cast(lengths, I64)
    fits = builder.op("Equal", builder.op("Shape", lengths), builder.shape(x, batch, batch + 1))
    bad = either(
        builder,
        note(builder.op("Less", wide, builder.integer(1)), BOOL),
        note(builder.op("Greater", wide, builder.shape(x, steps, steps + 1)), BOOL),
        note(builder.op("Not", note(fits, BOOL)), BOOL),
    )
    zero = refuse_where(builder, bad)
    refusing = zero.producer()
    assert refusing is not None
    refusing.name = f"{node.name or node.outputs[0].name}/{LENGTHS}"
    checked = builder.op("Add", lengths, builder.cast(zero, lengths.dtype))
    return note(checked, lengths.dtype, lengths.shape)


def _are_checked(lengths: ir.Value) -> bool:
    """Return whether :func:`check_lengths` made these lengths: it adds what the check returns."""
    value: ir.Value | None = lengths
    for kind, index in (("Add", 1), ("Cast", 0)):
        node = None if value is None else value.producer()
        if node is None or node.op_type != kind:
            return False
        value = node.inputs[index]
    refusing = None if value is None else value.producer()
    return refusing is not None and (refusing.name or "").endswith(f"/{LENGTHS}")
