"""Fused operators behind one another, whose shapes become known one by one."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.gate.fused_operators import DOMAIN
from splitonnx.partitioner.normalization.fused.replacements import replace_foreign, replace_fused
from tests.support.fused_models import draw, run_stock


def build(*, is_shaped: bool = True) -> onnx.ModelProto:
    """Build products whose swapped operands are results of fused operators."""
    nodes = [
        helper.make_node("QuickGelu", ["x"], ["a"], domain=DOMAIN),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("FastGelu", ["b"], ["c"], domain=DOMAIN),
        helper.make_node("FusedMatMul", ["c", "c"], ["d"], name="fused", domain=DOMAIN, transB=1),
        helper.make_node("FusedMatMul", ["d", "c"], ["e"], domain=DOMAIN, transA=1, alpha=0.5),
        helper.make_node("ArrayFeatureExtractor", ["e", "one"], ["y"], domain="ai.onnx.ml"),
    ]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", 1, ["N", 3, 4] if is_shaped else None)],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(draw(4, 5), "w"), numpy_helper.from_array(np.array([1]), "one")],
    )
    imports = [
        helper.make_opsetid("", 18),
        helper.make_opsetid(DOMAIN, 1),
        helper.make_opsetid("ai.onnx.ml", 3),
    ]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def test_each_is_replaced_once_what_it_reads_is_known() -> None:
    model, data = build(), {"x": draw(2, 3, 4)}
    written = ir.from_proto(model)
    replace_foreign(written)
    assert all(not node.domain for node in written.graph)
    assert DOMAIN not in written.opset_imports
    (expected,) = run_stock(model, data)
    found, *_ = ReferenceEvaluator(ir.to_proto(written)).run(None, data)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-5)


def test_a_shape_that_stays_unknown_is_named() -> None:
    model = ir.from_proto(build(is_shaped=False))
    with pytest.raises(UnsupportedModel, match=r"'fused' \(FusedMatMul\): the rank of 'c'"):
        replace_fused(model)
