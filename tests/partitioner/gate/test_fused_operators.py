"""Which of ONNX Runtime's operators the gate lets pass."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.gate.fused_operators import (
    DOMAIN,
    FUSED,
    claim_fused,
    is_fused,
    refuse_domain,
)
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.normalization.fused.replacements import FORMULAS
from tests.support.fused_models import build_fused

X = {"x": np.ones((2, 3), np.float32)}
SCALE = {"scale": np.ones(3, np.float32)}


def test_each_fused_operator_has_a_formula_or_holds_packed_weights() -> None:
    assert FORMULAS.keys() | {"MatMulNBits"} == FUSED
    assert is_fused(helper.make_node("Gelu", [], [], domain=DOMAIN))
    assert not is_fused(helper.make_node("Gelu", [], []))


@pytest.mark.parametrize(
    ("kind", "opset", "is_claimed"),
    [
        ("SimplifiedLayerNormalization", 18, True),
        ("LayerNormalization", 16, True),
        ("LayerNormalization", 17, False),
    ],
)
def test_a_layer_norm_that_the_opset_lacks_is_ort_s(
    kind: str, opset: int, is_claimed: bool
) -> None:
    model = build_fused(kind, ["x", "scale"], X, SCALE, domain="", axis=-1)
    del model.opset_import[:]
    model.opset_import.append(helper.make_opsetid("", opset))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, ["N", 3]))
    claimed = claim_fused(model, opset)
    assert (claimed is not model) is is_claimed
    assert claimed.graph.node[0].domain == (DOMAIN if is_claimed else "")
    assert model.graph.node[0].domain == ""
    open_model(model)


def test_the_others_of_ort_are_told_from_those_of_other_domains() -> None:
    ours = refuse_domain(helper.make_node("Inverse", [], ["y"], domain=DOMAIN))
    assert "optimized model; export the model without the optimizer" in str(ours)
    assert "onnxruntime.transformers with only_onnxruntime=True and opt_level=1" in str(ours)
    other = refuse_domain(helper.make_node("Inverse", [], ["y"], domain="my.domain"))
    assert "'my.domain' is not one of ONNX's own" in str(other)
    for domain in (DOMAIN, "my.domain"):
        model = build_fused("Inverse", ["x"], X, {}, domain=domain)
        model.opset_import.append(helper.make_opsetid("my.domain", 1))
        with pytest.raises(UnsupportedModel, match=r"'fused' \(Inverse\)"):
            open_model(model)


def test_the_settings_that_the_advice_names_are_those_of_ort_s_optimizer() -> None:
    found = find_spec("onnxruntime")
    assert found is not None
    assert found.origin is not None
    source = Path(found.origin).parent.joinpath("transformers", "optimizer.py").read_text("utf-8")
    (function,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "optimize_model"
    ]
    names = {argument.arg for argument in function.args.args}
    assert {"only_onnxruntime", "opt_level"} <= names
    assert "optimize_model(input, opt_level=1, use_gpu=False, only_onnxruntime=True)" in source
