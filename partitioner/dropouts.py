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
    if len(node.outputs) > 1 and node.outputs[1].uses():
        raise UnsupportedModel(f"node '{node.name}' (Dropout)", "its mask is used by other nodes")
    identity = ir.node("Identity", [node.inputs[0]], name=node.name)
    _take_over(graph, node, [identity], identity.outputs[0])


def _write_out(graph: ir.Graph, node: ir.Node, key: ir.Value, ratio: float) -> None:
    if len(node.outputs) > 1 and node.outputs[1].uses():
        raise UnsupportedModel(f"node '{node.name}' (Dropout)", "its mask is used by other nodes")
    x = node.inputs[0]
    assert x is not None
    assert x.dtype is not None
    tape = ir.tape.Tape()
    mask = _draw_mask(tape, x, key, node.name or "", 1.0 - ratio)
    factor = _cast(tape, mask, x.dtype)
    scale = tape.op("Constant", [], {"value": ir.tensor(1.0 / (1.0 - ratio), dtype=x.dtype)})
    factor = tape.op("Mul", [factor, scale])
    factor.type, factor.shape = x.type, x.shape  # spares the gradient its broadcast analysis
    output = tape.op("Mul", [x, factor])
    for index, new in enumerate(tape.nodes):
        new.name = f"{node.name}/{index}_{new.op_type}"
        new.outputs[0].name = f"{node.name}/{index}"
    _take_over(graph, node, list(tape.nodes), output)


def _draw_mask(tape: ir.tape.Tape, x: ir.Value, key: ir.Value, name: str, keep: float) -> ir.Value:
    """Compute the boolean mask in the shape of ``x``."""

    def integer(value: int | list[int], dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        return tape.op("Constant", [], {"value": ir.tensor(value, dtype=dtype)})

    def word(value: ir.Value) -> ir.Value:
        return _cast(tape, value, ir.DataType.UINT32)

    def long(value: ir.Value) -> ir.Value:
        return _cast(tape, value, ir.DataType.INT64)

    def fold(value: ir.Value, shift: int) -> ir.Value:
        shifted = tape.op(
            "BitShift", [value, integer(shift, ir.DataType.UINT32)], {"direction": "RIGHT"}
        )
        return tape.op("BitwiseXor", [value, shifted])

    def multiply(value: ir.Value, factor: int) -> ir.Value:
        return word(tape.op("Mul", [long(value), integer(factor)]))

    def scramble(value: ir.Value, *, within: ir.Value | None = None) -> ir.Value:
        value = multiply(fold(value, 16), _MULTIPLIERS[0])
        if within is not None:
            value = tape.op("BitwiseXor", [value, within])
        return fold(multiply(fold(value, 15), _MULTIPLIERS[1]), 16)

    spread = tape.op(
        "ReduceSum",
        [tape.op("Mul", [tape.op("Mod", [key, integer(2**31)]), integer(list(_SPREAD))])],
        {"keepdims": 0},
    )
    named = tape.op("Add", [spread, integer(zlib.crc32(name.encode()))])
    first = scramble(word(named))
    second = scramble(tape.op("BitwiseXor", [first, integer(0x5BD1E995, ir.DataType.UINT32)]))
    count = tape.op("Size", [x])
    index = tape.op("Range", [integer(0), count, integer(1)])
    mixed = scramble(word(tape.op("Add", [index, long(first)])), within=second)
    kept = tape.op("Less", [long(mixed), integer(round(keep * 2**32))])
    return tape.op("Reshape", [kept, tape.op("Shape", [x])])


def _cast(tape: ir.tape.Tape, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    return tape.op("Cast", [value], {"to": dtype.value})


def _take_over(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node], output: ir.Value) -> None:
    old = node.outputs[0]
    output.name, output.type, output.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [output])
