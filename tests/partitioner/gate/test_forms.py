"""What onnx's own checker refuses is refused in one line, whatever the size of the weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from splitonnx.errors import ModelError, NativeCrash, NotAModel
from splitonnx.partitioner.gate import forms
from splitonnx.partitioner.gate.forms import check_declared_types, check_form
from splitonnx.partitioner.gate.gates import open_model
from tests.partitioner.gate.broken_models import Breakage, hold_refusal, make_model


def wrong_type(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.INT32


BROKEN: list[Breakage] = [
    (wrong_type, NotAModel, "linear0"),
]


@pytest.mark.parametrize(
    ("break_it", "kind", "reason"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_model_is_refused_in_one_line(
    break_it: Callable[[ModelProto], None], kind: type[ModelError], reason: str
) -> None:
    hold_refusal(break_it, kind, reason)


def grow(model: ModelProto, dtype: type = np.float32) -> ModelProto:
    """Add a MatMul of the input with a weight that is 600 columns wide."""
    weight = numpy_helper.from_array(np.ones((6, 600), dtype), "large")
    model.graph.initializer.append(weight)
    model.graph.node.append(helper.make_node("MatMul", ["x", "large"], ["wide"], name="wide"))
    return model


def test_large_weights_are_checked_by_their_shape_and_never_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[ModelProto] = []

    def record(function: object, label: str, content: bytes) -> None:
        sent.append(ModelProto.FromString(content))

    model = grow(make_model())
    before = model.SerializeToString(deterministic=True)
    monkeypatch.setattr(forms, "call", record)
    check_form(model, "the model")
    (light,) = sent
    assert "large" not in {tensor.name for tensor in light.graph.initializer}
    assert "large" in {value.name for value in light.graph.input}
    assert {tensor.name for tensor in light.graph.initializer} >= {"w0", "b0"}
    assert model.SerializeToString(deterministic=True) == before


def test_a_large_weight_of_the_wrong_type_is_refused_all_the_same() -> None:
    check_form(grow(make_model()), "the model")
    with pytest.raises(NotAModel, match="wide"):
        check_form(grow(make_model(), np.int32), "the model")


def test_a_crash_is_attributed_to_the_node_that_brings_it_about(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    culprit = model.graph.node[5].name
    tries = []

    def crash(function: object, label: str, content: bytes) -> None:
        light = ModelProto.FromString(content)
        tries.append(len(light.graph.node))
        if culprit in {node.name for node in light.graph.node}:
            raise NativeCrash(label, "it broke down")

    monkeypatch.setattr(forms, "call", crash)
    with pytest.raises(NativeCrash, match=f"node '{culprit}'"):
        check_form(model, "the model")
    assert len(tries) <= 1 + len(model.graph.node).bit_length()  # each costs a process


HEAD = '<ir_version: 9, opset_import: ["" : 18, "own" : 1]>'
BRANCHES = """model (float[N,4] x, bool c) => (float[N,4] y) {
    y = If (c) <then_branch = t () => (float[N,4] u) <BODY[N,4] i> { i = Relu (x) u = Tanh (i) },
                else_branch = e () => (float[N,4] v) { v = Tanh (x) }>
}"""
DEFAULTS = """model (float[3,4] x) => (float[3,4] y) <int64[3,4] i> {
    i = own.Eye (x) y = Cast <to = 1> (i)
}
<domain: "own", opset_import: ["" : 18]>
Eye <dtype: int = 7> (a) => (b) { b = EyeLike <dtype: int = @dtype> (a) }"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "model (float[N,4] x) => (float[N,4] y) <int64[N,4] h> { h = Relu (x) y = Relu (h) }",
            "it declares 'h' as INT64, but node 'h' (Relu) computes FLOAT",
        ),
        (
            "model (float[N,4] x) => (float16[N,4] y) { y = Relu (x) }",
            "it declares 'y' as FLOAT16, but node 'y' (Relu) computes FLOAT",
        ),
        (
            BRANCHES.replace("BODY", "double"),
            "it declares 'i' as DOUBLE, but node 'i' (Relu) computes FLOAT",
        ),
    ],
)
def test_a_type_that_contradicts_the_node_is_refused_as_by_onnx_runtime(
    text: str, told: str
) -> None:
    model = onnx.parser.parse_model(HEAD + text)
    with pytest.raises(Exception, match="does not match expected type"):
        ort.InferenceSession(model.SerializeToString())
    with pytest.raises(NotAModel) as caught:
        open_model(model)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "model (float[N,4] x) => (float[N,4] y) <float[N,9] h> { h = Relu (x) y = Relu (h) }",
        "model (float[N,4] x) => (float[N,4] y) <float[N,4] gone> { y = Relu (x) }",
        BRANCHES.replace("BODY", "float"),
        DEFAULTS,
    ],
)
def test_right_types_are_taken(text: str) -> None:
    model = onnx.parser.parse_model(HEAD + text)
    given = model.SerializeToString(deterministic=True)
    check_declared_types(model, "the model")
    assert model.SerializeToString(deterministic=True) == given
