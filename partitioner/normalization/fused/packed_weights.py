"""Convert the 2-, 4- and 8-bit weights of MatMulNBits to float weights, which can be trained."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.gate.fused_operators import DOMAIN
from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array, take_input
from splitonnx.partitioner.graphs.traversals import list_nodes
from splitonnx.partitioner.normalization.fused.operands import take_optional

_BEFORE = (
    "take the file from before its weights were packed (by MatMul4BitsQuantizer or "
    "MatMulNBitsQuantizer of onnxruntime.quantization, or a builder of language models), or have "
    "them packed into 2, 4 or 8 bits, stored in the file, and without an order of groups (g_idx, "
    "GPTQ's act_order)"
)


def unpack_weights(graph: ir.Graph) -> None:
    """Replace each MatMulNBits by a MatMul with a float weight, in place.

    The name of the float weight is the name of the packed weight, followed by ``#float``.

    Raises:
        UnsupportedModel: a packed weight is not stored in the model, or its format is not
            supported.
    """
    for node in list_nodes(graph):
        if node.domain == DOMAIN and node.op_type == "MatMulNBits":
            _unpack(node)


def _unpack(node: ir.Node) -> None:
    owner = node.graph
    packed, scales = take_input(node, 1), take_input(node, 2)
    points, order = take_optional(node, 3), take_optional(node, 4)
    numbers, factors = known_array(packed), known_array(scales)
    zeros = None if points is None else known_array(points)
    groups = None if order is None else known_array(order)
    if (
        numbers is None
        or factors is None
        or (points is not None and zeros is None)
        or (order is not None and groups is None)
    ):
        raise _refuse(node, "its weight is not stored in the model")
    assert isinstance(owner, ir.Graph)
    weight = _dequantize(node, numbers, factors, zeros, groups)
    name = f"{packed.name}#float"
    value = ir.Value(name=name, const_value=ir.tensor(weight.astype(factors.dtype), name=name))
    owner.register_initializer(value)
    builder = NodeBuilder(f"{node.outputs[0].name or node.name}/unpacked")
    product = builder.op("MatMul", take_input(node), value)
    if (bias := take_optional(node, 5)) is not None:
        product = builder.op("Add", product, bias)
    builder.replace(node, [product])
    for unused in (packed, scales, points, order):
        if unused is not None and not unused.uses() and unused.is_initializer():
            owner.initializers.pop(unused.name or "", None)


def _dequantize(
    node: ir.Node,
    numbers: np.ndarray,
    factors: np.ndarray,
    zeros: np.ndarray | None,
    groups: np.ndarray | None,
) -> np.ndarray:
    """Return the array ``[K, N]`` of floats, ``(number - zero point) * scale`` in each block.

    ``groups`` is the block of each of the K rows, if they are not in order.
    """
    rows, columns = node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 0)
    if bits not in (2, 4, 8) or block < 16 or min(rows, columns) < 1:
        raise _refuse(
            node, f"its weight of {rows} x {columns} has {bits} bits in blocks of {block}"
        )
    blocks = -(-rows // block)
    shape = (columns, blocks)
    if numbers.size != columns * blocks * (block * bits // 8) or factors.size != columns * blocks:
        raise _refuse(node, "its weight or its scales have another size than it says")
    whole = _split_bytes(numbers.reshape(*shape, -1), bits).reshape(columns, -1)[:, :rows]
    scale = factors.reshape(shape).astype(np.float64)
    usual = 1 << (bits - 1)
    if zeros is None:
        zero: np.ndarray = np.full(shape, usual)
    elif zeros.dtype == np.uint8:
        zero = _split_bytes(zeros.reshape(columns, -1), bits)[:, :blocks]
    else:
        zero = zeros.reshape(shape)
    if groups is None:
        places = np.arange(rows) // block
    else:
        places = _read_groups(node, groups, rows, blocks)
        if zeros is not None and zeros.dtype == np.uint8 and (zero != usual).any():
            raise _refuse(
                node,
                "its rows are in groups of their own order (g_idx) with packed zero points, which "
                "ONNX Runtime 1.19 leaves out",
            )
    weight: np.ndarray = ((whole - zero[:, places]) * scale[:, places]).T
    return weight


def _read_groups(node: ir.Node, groups: np.ndarray, rows: int, blocks: int) -> np.ndarray:
    """Return the block of each row, of which ``groups`` may hold more, up to whole blocks."""
    places = groups.reshape(-1)[:rows]
    if len(places) < rows or (places < 0).any() or (places >= blocks).any():
        raise _refuse(node, f"its input g_idx does not name one of {blocks} groups for each row")
    return places


def _refuse(node: ir.Node, reason: str) -> UnsupportedModel:
    name = node.name or node.outputs[0].name
    return UnsupportedModel(f"node '{name}' ({node.op_type})", reason, _BEFORE)


def _split_bytes(packed: np.ndarray, bits: int) -> np.ndarray:
    """Split each byte into the numbers packed in it, beginning with the lowest bits."""
    count = 8 // bits
    parts = [(packed >> (bits * place)) & ((1 << bits) - 1) for place in range(count)]
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1).astype(np.float64)
