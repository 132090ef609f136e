"""Weights stored as integers that can only stay as they are: found, and told of."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from splitonnx.partitioner.normalization.dequantized.untrained import find_untrained_integers
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.remarks import Kind

TABLE = f"uint8[6, 4] t = {{{', '.join(map(str, range(3, 27)))}}}"


def build(read: str, *, held: str = "") -> onnx.ModelProto:
    """Build a layer, and beside it rows of two tables, ``one`` and ``two``, which ``read`` makes.

    ``held`` is a node that holds the stored table ``t`` instead of an initializer.
    """
    weights = ", ".join(["0.3"] * 16)
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 19]>
        tables (float[N, 4] x, int64[N] ids, float factor, bool choice) => (float[N, 4] y)
        <{"" if held else f"{TABLE}, "}float s = {{0.1}}, float r = {{0.2}}, uint8 z = {{3}},
         int64[2] halves = {{3, 3}}, int64[4] more = {{0, 0, 1, 0}}, float[4, 4] w = {{{weights}}}>
        {{ {held} h = MatMul (x, w)  {read}
           a = Gather (one, ids)  b = Gather (two, ids)  c = Add (a, b)  y = Add (h, c) }}"""
    )


TWICE = "two = Mul (one, r)"
STAYING = {
    "with several scales": "one = DequantizeLinear (t, s, z)  two = DequantizeLinear (t, r, z)",
    "with several zero points": "one = DequantizeLinear (t, s, z)  two = DequantizeLinear (t, s)",
    "with a computed scale": f"k = Mul (s, factor)  one = DequantizeLinear (t, k, z)  {TWICE}",
    "behind a Split": "f, g = Split <axis = 0> (t, halves)  "
    "one = DequantizeLinear (f, s, z)  two = DequantizeLinear (g, s, z)",
    "behind a Pad": f"p = Pad (t, more, z)  one = DequantizeLinear (p, s, z)  {TWICE}",
    "behind a Cast": f"i = Cast <to = 6> (t)  one = DequantizeLinear (i, s)  {TWICE}",
    "in a body": """one = If (choice) <
        then_branch = yes () => (float[6, 4] e) { e = DequantizeLinear (t, s, z) },
        else_branch = no () => (float[6, 4] f) { f = DequantizeLinear (t, r, z) }
    >  """
    + TWICE,
}


@pytest.mark.parametrize("reason", STAYING)
def test_stored_integers_that_can_only_stay_are_named(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(STAYING[reason])
    assert find_untrained_integers(ir.from_proto(model).graph) == {"t": 24}
    found = check(model, loss="mse")
    assert found.parameters == 16  # of w
    (remark,) = [one for one in found.remarks if one.kind is Kind.UNTRAINED_INTEGERS]
    assert remark.names == ("t",)
    assert remark.sentence.startswith("'t': 24 quantized numbers are not trained, since")
    with caplog.at_level(logging.WARNING):
        bundle = cut(model, at=None, loss="mse", check=False)
    assert remark.sentence in caplog.messages
    assert "t#exp_avg" not in bundle.client.weights


@pytest.mark.parametrize("kind", ["float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz"])
def test_floats_of_8_bits_with_several_scales_are_named(kind: str) -> None:
    model = build(STAYING["with several scales"].replace(", z)", ")"))
    (table,) = [tensor for tensor in model.graph.initializer if tensor.name == "t"]
    values = np.linspace(-2, 2, 24).reshape(6, 4)
    number = onnx.TensorProto.DataType.Value(kind.upper())
    table.CopyFrom(helper.make_tensor("t", number, values.shape, values.flatten().tolist()))
    found = check(model, loss="mse")
    assert found.parameters == 16  # of w
    (remark,) = [one for one in found.remarks if one.kind is Kind.UNTRAINED_INTEGERS]
    assert remark.sentence.startswith("'t': 24 quantized numbers are not trained, since")


@pytest.mark.parametrize(
    "read",
    [
        f"one = DequantizeLinear (t, s, z)  {TWICE}",
        "one = DequantizeLinear (t, s, z)  two = DequantizeLinear (t, s, z)",
    ],
)
@pytest.mark.parametrize("is_constant", [False, True])
def test_nothing_is_said_of_integers_that_are_trained(read: str, is_constant: bool) -> None:
    held = f"t = Constant <value = {TABLE.replace(' t = ', ' ')}> ()" if is_constant else ""
    model = build(read, held=held)
    assert find_untrained_integers(ir.from_proto(model).graph) == {}
    found = check(model, loss="mse")
    assert found.parameters == 16 + 24
    assert Kind.UNTRAINED_INTEGERS not in {remark.kind for remark in found.remarks}


def test_integers_that_the_option_turns_into_floats_are_left_to_it() -> None:
    moved = build(
        f"p = Transpose (t)  q = Transpose (p)  one = DequantizeLinear (q, s, z)  {TWICE}"
    )
    assert find_untrained_integers(ir.from_proto(moved).graph) == {}
    assert Kind.STORED_INTEGERS in {one.kind for one in check(moved, loss="mse").remarks}


def test_integers_that_floats_were_made_of_before_are_not_meant() -> None:
    again = build(
        "f = DequantizeLinear (t, s, z)  n = Neg (f)  q = QuantizeLinear (n, s, z)  "
        f"one = DequantizeLinear (q, s, z)  {TWICE}"
    )
    assert find_untrained_integers(ir.from_proto(again).graph) == {}
