"""Forms of a model are divided at named tensors; what the loss does not need does not cross."""

from __future__ import annotations

import pytest
from onnx import helper

from splitonnx.errors import IntegerCut, NotACut
from splitonnx.partitioner.cutting.divisions import divide_inference, divide_training
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.graphs.readings import copy_model
from tests.support.small_models import load_model
from tests.support.zoo import FLOAT, Net


def test_an_integer_behind_trained_parameters_is_refused_by_name() -> None:
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w", 6, 5), out="h")
    place = net.op("ArgMax", hidden, out="place", axis=1, keepdims=0)
    net.op("MatMul", net.op("Gather", net.weight("t", 5, 4), place, out="rows"),
           net.weight("v", 4, 3), out="y")  # fmt: skip
    prepared = prepare(open_model(net.finish({"x": (FLOAT, ["N", 6])}, "y", 3)))
    with pytest.raises(IntegerCut, match=r"'place' is INT64.*'w'"):
        divide_inference(prepared, copy_model(prepared.inference).graph, ("place",), ())


def build_heads() -> PreparedModel:
    """Build a model with two outputs behind one layer, each with a layer of its own."""
    net = Net()
    net.op("MatMul", "x", net.weight("w", 6, 5), out="h")
    net.op("MatMul", "h", net.weight("a", 5, 3), out="y")
    net.op("MatMul", "h", net.weight("b", 5, 2), out="z")
    model = net.finish({"x": (FLOAT, ["N", 6])}, "y", 3)
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, ["N", 2]))
    return prepare(open_model(model))


def test_a_cut_that_the_loss_does_not_depend_on_is_refused() -> None:
    prepared = build_heads()
    with pytest.raises(NotACut, match="output 'y', from which the loss is computed, does not"):
        divide_training(prepared, copy_model(prepared.training).graph, ("z",), (), ["y"])


def test_a_raw_input_that_another_output_needs_crosses_for_prediction_alone() -> None:
    prepared = prepare(open_model(load_model("34_passed_through")))
    at = ("b", "x")
    (output,) = [v.name or "" for v in prepared.training.graph.outputs if v.name != "x"][:1]
    trained = divide_training(prepared, copy_model(prepared.training).graph, at, (), [output])
    predicted = divide_inference(prepared, copy_model(prepared.inference).graph, at, ())
    assert [value.name for value in trained.at] == ["b"]
    assert [value.name for value in predicted.at] == ["b", "x"]
