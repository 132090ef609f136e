"""Which operators of quantisation tools are known, and what is said of them."""

from __future__ import annotations

import pytest
from onnx import helper

from splitonnx.partitioner.gate.quantized_operators import (
    STANDARD_TOOLS,
    TOOLS,
    refuse_quantized,
)
from splitonnx.partitioner.normalization.dequantized import replacements, static


@pytest.mark.parametrize("kind", sorted(TOOLS))
def test_the_refusal_names_the_tool_and_the_option(kind: str) -> None:
    error = refuse_quantized(helper.make_node(kind, ["x"], ["y"], name="node"))
    assert "node 'node'" in str(error)
    assert f"as {TOOLS[kind]} writes it" in str(error)
    assert "--dequantize" in str(error)


def test_a_format_that_is_not_dequantized_is_refused_without_the_option() -> None:
    error = refuse_quantized(helper.make_node("MatMulBnb4", ["x"], ["y"], name="node"))
    assert "matmul_bnb4_quantizer" in str(error)
    assert "--dequantize" not in str(error)


def test_other_operators_are_not_spoken_of() -> None:
    assert refuse_quantized(helper.make_node("Gelu", ["x"], ["y"])) is None


def test_each_operator_that_passes_the_gate_has_a_formula() -> None:
    assert set(TOOLS) <= {*replacements.DYNAMIC, *static.FORMULAS}
    assert set(STANDARD_TOOLS) <= {*replacements.PRODUCTS, *static.FORMULAS}
