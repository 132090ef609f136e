"""A prepared model whose batch was freed is compared with its file's model before any cut."""

from __future__ import annotations

import onnx
import pytest

from splitonnx.errors import MixedSamples, UnsupportedModel
from splitonnx.partitioner.cutting.conformance import freeing_trials
from splitonnx.partitioner.cutting.conformance.freeing_trials import Trials
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.adjustments import NONE, Adjustments
from splitonnx.partitioner.gate.gates import open_model
from tests.support.nets import FLOAT, Net
from tests.support.small_models import load_model

FREED = Adjustments(dims={"x:0": "N"})


def build(axis: int, *, kind: str = "Softmax", batch: int | str = 1) -> onnx.ModelProto:
    net = Net()
    value = net.op("MatMul", "x", net.weight("w", 4, 3), out="m")
    attributes = {"axis": axis} if kind == "Softmax" else {}
    value = net.op(kind, value, out="s", **attributes)
    model = net.finish({"x": (FLOAT, [batch, 4])}, net.op("Tanh", value, out="y"), 3)
    model.graph.output[0].type.tensor_type.shape.dim[0].Clear()
    return model


def compare(trials: Trials, adjustments: Adjustments = FREED) -> list[str]:
    opened = open_model(trials.source, adjustments)
    return trials.compare(prepare(opened, adjustments=adjustments))


def test_a_batch_can_be_freed_where_samples_stay_apart() -> None:
    assert compare(Trials(source=build(1))) == []
    assert Trials(source=build(1)).free(NONE, ["x"]) == []


def test_a_batch_cannot_be_freed_where_samples_are_mixed() -> None:
    with pytest.raises(MixedSamples) as caught:
        compare(Trials(source=build(0)))
    error = Trials(source=build(0)).free(NONE, ["x"])
    assert isinstance(error, MixedSamples)
    assert error.node == caught.value.node == "s_node"


def test_an_author_who_mixes_samples_of_any_batch_is_not_contradicted() -> None:
    assert compare(Trials(source=build(0, batch="N")), NONE) == []
    assert compare(Trials(source=build(0, batch="N")), Adjustments(dims={"N": 4})) == []


def test_samples_in_the_channels_of_a_normalization_stay_apart() -> None:
    model = load_model("13_instancenorm_as_bn")  # normalizes (1, N C, H W)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    assert Trials(source=model).free(NONE, ["x"]) == []


def test_what_is_not_compared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(freeing_trials, "USUAL_BYTES", 10)
        (note,) = compare(Trials(source=build(0)))
    assert note.startswith("--dim x:0=N: ")
    assert "not checked (its weights take 0 MB)" in note
    (note,) = compare(Trials(source=build(0, kind="Bernoulli")))
    assert "draws random numbers" in note


def test_an_error_before_the_comparison_is_returned() -> None:
    model = build(1)
    model.graph.node[1].op_type = "Unheard"
    assert isinstance(Trials(source=model).free(NONE, ["x"]), UnsupportedModel)
