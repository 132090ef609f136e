"""Keep ONNX Runtime's integer kernels from computing other results than the model defines.

On x86 processors without VNNI, ONNX Runtime multiplies unsigned by signed 8-bit numbers and adds
two products in 16 bits.  If the sum needs more bits, it becomes the largest 16-bit number, and the
results are too small by up to half, without an error.  Products of unsigned numbers are added in 32
bits.  Therefore, signed operands are converted to unsigned numbers: 128 is added to all elements
and to the zero point, which does not change the results.

A MatMul, Gemm or Conv between a DequantizeLinear and a QuantizeLinear computes with floats, but
ONNX Runtime's optimizer replaces it with an integer operator.  splitonnx's own sessions turn this
off (:mod:`splitonnx.session_settings`).  :func:`list_saturating` finds the weights that may give
wrong results in other sessions.

The optimizer also merges two consecutive pairs of QuantizeLinear and DequantizeLinear into one
pair, which rounds once instead of twice.  A node between the two pairs prevents this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.errors import quote
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array
from splitonnx.partitioner.graphs.traversals import list_bodies, list_nodes
from splitonnx.partitioner.lowerings.optimization_barriers import find_producer, insert_barrier
from splitonnx.session_settings import FUSION

SAFE = 64
"""The largest absolute value of signed 8-bit weights with which no sum of products saturates.

Two products of 255 and 64 still fit into 16 bits.
"""
_RAISED = 128
"""What is added to make signed 8-bit numbers unsigned."""


@dataclass(frozen=True, kw_only=True)
class _Operands:
    """The indices of each operand and its zero point, and of the output's zero point."""

    first: tuple[int, int]
    second: tuple[int, int]
    output: int | None = None


_OPERANDS: Mapping[str, _Operands] = {
    "ConvInteger": _Operands(first=(0, 2), second=(1, 3)),
    "MatMulInteger": _Operands(first=(0, 2), second=(1, 3)),
    "QLinearConv": _Operands(first=(0, 2), second=(3, 5), output=7),
    "QLinearMatMul": _Operands(first=(0, 2), second=(3, 5), output=7),
}
_FUSED = frozenset({"Conv", "Gemm", "MatMul"})
_MOVING = frozenset({"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def use_unsigned_integers(graph: ir.Graph) -> None:
    """Convert the signed operands of integer products to unsigned numbers, in place.

    A node is left unchanged if its second operand, usually the weights, contains only unsigned
    numbers or no number with an absolute value above :data:`SAFE`.  Nodes in the subgraph bodies of
    control-flow nodes are converted as well.
    """
    for node in list(graph):
        for body in list_bodies(node):
            use_unsigned_integers(body)
        operands = None if node.domain else _OPERANDS.get(node.op_type)
        if operands is not None and _may_saturate(node.inputs[operands.second[0]]):
            _raise_operands(node, operands)


def _may_saturate(value: ir.Value | None) -> bool:
    """Return whether products with ``value`` may need more than 16 bits."""
    tensor = None if value is None else value.const_value
    if value is None or (value.dtype or (tensor and tensor.dtype)) != ir.DataType.INT8:
        return False
    known = known_array(value)
    return known is None or bool(np.abs(known.astype(np.int16)).max(initial=0) > SAFE)


def _raise_operands(node: ir.Node, operands: _Operands) -> None:
    first = node.inputs[operands.first[0]]
    is_signed = first is not None and first.dtype == ir.DataType.INT8
    builder = NodeBuilder(f"{node.outputs[0].name}/unsigned")
    changed = [operands.second, *([operands.first] if is_signed else [])]
    indices = [index for pair in changed for index in pair]
    if is_signed and operands.output is not None:
        indices.append(operands.output)
    inputs = list(node.inputs) + [None] * (max(indices) + 1 - len(node.inputs))
    graph = node.graph
    assert graph is not None
    for index in indices:
        inputs[index] = _raise(graph, builder, inputs[index])
    made = builder.ops(node.op_type, inputs, 1, dict(node.attributes))[0]
    builder.nodes[-1].name = node.name  # by which errors name it
    if is_signed and operands.output is not None:
        made = builder.op("Cast", made, to=ir.DataType.INT32.value)
        made = builder.op("Sub", made, builder.number(_RAISED, ir.DataType.INT32))
        made = builder.op("Cast", made, to=ir.DataType.INT8.value)
    builder.replace(node, [made])


def _raise(graph: ir.Graph, builder: NodeBuilder, value: ir.Value | None) -> ir.Value:
    """Return a signed operand or zero point as unsigned numbers; a missing zero point is 0."""
    if value is None:
        return builder.number(_RAISED, ir.DataType.UINT8)
    known = known_array(value)
    if known is not None:
        return _store_raised(graph, f"{value.name}#unsigned", known)
    wide = builder.op("Cast", value, to=ir.DataType.INT32.value)
    moved = builder.op("Add", wide, builder.number(_RAISED, ir.DataType.INT32))
    made = builder.op("Cast", moved, to=ir.DataType.UINT8.value)
    made.type, made.shape = ir.TensorType(ir.DataType.UINT8), value.shape
    return made


def _store_raised(graph: ir.Graph, name: str, signed: np.ndarray) -> ir.Value:
    """Return the initializer ``name`` that holds ``signed`` as unsigned numbers."""
    if name not in graph.initializers:
        raised = (signed.astype(np.int16) + _RAISED).astype(np.uint8)
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(raised, name=name)))
    return graph.initializers[name]


def separate_pairs(graph: ir.Graph) -> None:
    """Insert barriers so that ONNX Runtime does not merge pairs of quantization operators.

    A barrier separates a DequantizeLinear from the QuantizeLinear after it.  The graph is changed
    in place, including the subgraph bodies of control-flow nodes.
    """
    for node in list(graph):
        for body in list_bodies(node):
            separate_pairs(body)
        is_quantizer = node.op_type == "QuantizeLinear" and not node.domain
        if is_quantizer and find_producer(node.inputs[0], "DequantizeLinear") is not None:
            insert_barrier(node, 0)


def list_saturating(graph: ir.Graph) -> list[str]:
    """List the weights that may cause saturation if ONNX Runtime uses integer kernels.

    These are tensors of signed 8-bit numbers that a DequantizeLinear turns into the second operand
    of a MatMul, Gemm or Conv.  A weight is listed if the absolute value of a number is larger than
    :data:`SAFE`, or if its numbers are not known.
    """
    found = []
    for node in list_nodes(graph):
        if node.op_type != "DequantizeLinear" or node.domain or node.inputs[0] is None:
            continue
        if _may_saturate(node.inputs[0]) and _is_weight(node.outputs[0]):
            found.append(_name_weight(node.inputs[0]))
    return list(dict.fromkeys(found))


def describe_saturation(graph: ir.Graph) -> str | None:
    """Describe which weights may cause saturation, and the session setting that prevents it.

    Sessions that splitonnx creates have this setting; others may not.  Return ``None`` if no weight
    may cause saturation.
    """
    weights = list_saturating(graph)
    if not weights:
        return None
    more = f" and {len(weights) - 3} more" if len(weights) > 3 else ""
    return (
        f"on x86 processors without VNNI, a session with ONNX Runtime's usual settings may compute "
        f"too small products with {quote(weights[:3])}{more}, without an error; set its config "
        f'entry {FUSION} to "1" (docs/quantization.md)'
    )


def _is_weight(value: ir.Value) -> bool:
    """Return whether a product's second operand is ``value``, possibly reshaped or transposed."""
    for reader, index in value.uses():
        if reader.op_type in _FUSED and index == 1 and not reader.domain:
            return True
        if reader.op_type in _MOVING and not reader.domain and _is_weight(reader.outputs[0]):
            return True
    return False


def _name_weight(value: ir.Value) -> str:
    """Return the name of stored integers, or of the floats that a QuantizeLinear makes them of."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.inputs else None
    return (source or value).name or ""
