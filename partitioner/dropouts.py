"""Dropout whose mask is a function of seed, step, micro-batch and node alone.

onnxruntime's Dropout draws from a generator inside the session that can be neither read nor set.
Here the mask is computed in the graph from the scalar input ``splitonnx.key`` by integer
operators, so that a step can be repeated exactly, on any runtime: element ``i`` is kept where
``mix(i, key, node) < (1 - ratio) * 2**32``.  ``mix`` is the 32-bit finaliser "lowbias32" of
C. Wellons (public domain, nullprogram.com/blog/2018/07/31), its multiplications done in 64 bits
and cut back, as ONNX Runtime does not multiply uint32; the two halves of the key enter before
and within the mixing.
"""

from __future__ import annotations

import zlib

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.manifests import KEY
from splitonnx.partitioner.drafts import Draft
from splitonnx.partitioner.faults import blame

_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
"""Of lowbias32, as residues modulo 2**32 whose product with a uint32 fits in int64."""
_SPREAD = (0x3243F6A9, 0x2B7E1517, 0x1B873593)
"""Odd constants below 2**30 that spread seed, step and micro-batch over the key."""


def list_dropouts(graph: ir.Graph) -> list[ir.Node]:
    """List the graph's Dropout nodes in order."""
    return [node for node in graph if node.op_type == "Dropout" and not node.domain]


def drop_dropouts(graph: ir.Graph) -> None:
    """Replace every Dropout by an Identity under the same name, as in inference."""
    for node in list_dropouts(graph):
        _bypass(graph, node)


def key_dropouts(graph: ir.Graph, *, mode: str | None) -> None:
    """Write every Dropout that is on with a mask from the key; replace the others by Identity.

    ``mode`` is ``"keep"`` (all on), ``"off"`` (all off) or ``None`` for what each node says.
    """
    key: ir.Value | None = None
    for node in list_dropouts(graph):
        with blame(node):
            ratio = _read_ratio(node)
            on = _is_on(node) if mode is None else mode == "keep"
            if not on or ratio == 0.0:
                _bypass(graph, node)
                continue
            if key is None:
                key = ir.Value(name=KEY, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([3]))
                graph.inputs.append(key)
            _write_out(graph, node, key, ratio)


def _read_ratio(node: ir.Node) -> float:
    value = node.inputs[1] if len(node.inputs) > 1 else None
    if value is None:
        return 0.5
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise UnsupportedModel(f"node '{node.name}' (Dropout)", "its ratio is not a constant")
    ratio = float(tensor.numpy())
    if not 0.0 <= ratio < 1.0:
        raise UnsupportedModel(
            f"node '{node.name}' (Dropout)", f"its ratio {ratio} is not in [0, 1)"
        )
    return ratio


def _is_on(node: ir.Node) -> bool:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return False
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise UnsupportedModel(
            f"node '{node.name}' (Dropout)",
            "its training_mode is not a constant",
            "choose with --dropout keep|off",
        )
    return bool(tensor.numpy())


def _bypass(graph: ir.Graph, node: ir.Node) -> None:
    identity = ir.node("Identity", [node.inputs[0]], name=node.name)
    draft = Draft(f"{node.name}/mask")
    mask = None
    if _uses_mask(node):
        assert node.inputs[0] is not None
        everything = draft.number(1, ir.DataType.BOOL)
        mask = draft.op("Expand", everything, draft.shape(node.inputs[0]))
    _take_over(graph, node, [identity, *draft.nodes], identity.outputs[0], mask)


def _uses_mask(node: ir.Node) -> bool:
    mask = node.outputs[1] if len(node.outputs) > 1 else None
    return mask is not None and (bool(mask.uses()) or mask.is_graph_output())


def _write_out(graph: ir.Graph, node: ir.Node, key: ir.Value, ratio: float) -> None:
    x = node.inputs[0]
    assert x is not None
    draft = Draft(node.name or "")
    mask = _draw_mask(draft, x, key, node.name or "", 1.0 - ratio)
    scale = draft.number(1.0 / (1.0 - ratio), x.dtype)
    factor = draft.op("Mul", draft.cast(mask, x.dtype), scale)
    factor.type, factor.shape = x.type, x.shape  # spares the gradient its broadcast analysis
    output = draft.op("Mul", x, factor)
    _take_over(graph, node, draft.nodes, output, mask)


def _draw_mask(draft: Draft, x: ir.Value, key: ir.Value, name: str, keep: float) -> ir.Value:
    """Compute the boolean mask in the shape of ``x``."""

    def word(value: ir.Value) -> ir.Value:
        return draft.cast(value, ir.DataType.UINT32)

    def long(value: ir.Value) -> ir.Value:
        return draft.cast(value, ir.DataType.INT64)

    def xor(one: ir.Value, other: ir.Value) -> ir.Value:
        return _typed(draft.op("BitwiseXor", one, other), ir.DataType.UINT32)

    def fold(value: ir.Value, shift: int) -> ir.Value:
        places = draft.number(shift, ir.DataType.UINT32)
        return xor(value, draft.op("BitShift", value, places, direction="RIGHT"))

    def multiply(value: ir.Value, factor: int) -> ir.Value:
        product = draft.op("Mul", long(value), draft.integer(factor))
        return word(_typed(product, ir.DataType.INT64))

    def scramble(value: ir.Value, *, within: ir.Value | None = None) -> ir.Value:
        value = multiply(fold(value, 16), _MULTIPLIERS[0])
        if within is not None:
            value = xor(value, within)
        return fold(multiply(fold(value, 15), _MULTIPLIERS[1]), 16)

    spread = draft.op("Mul", draft.op("Mod", key, draft.integer(2**31)), draft.integers(_SPREAD))
    total = draft.op("ReduceSum", spread, keepdims=0)
    named = draft.op("Add", total, draft.integer(zlib.crc32(name.encode())))
    first = scramble(word(named))
    second = scramble(xor(first, draft.number(0x5BD1E995, ir.DataType.UINT32)))
    count = draft.op("Size", x)
    index = draft.op("Range", draft.integer(0), count, draft.integer(1))
    mixed = scramble(word(draft.op("Add", index, long(first))), within=second)
    kept = draft.op("Less", long(mixed), draft.integer(round(keep * 2**32)))
    return draft.op("Reshape", kept, draft.op("Shape", x))


def _typed(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Note a value's type, so that it is not cast to what it is already."""
    value.type = ir.TensorType(dtype)
    return value


def _take_over(
    graph: ir.Graph, node: ir.Node, nodes: list[ir.Node], output: ir.Value, mask: ir.Value | None
) -> None:
    old, new = [node.outputs[0]], [output]
    if _uses_mask(node) and mask is not None:
        old.append(node.outputs[1])
        new.append(mask)
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, old, new)
