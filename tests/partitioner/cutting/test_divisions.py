"""Forms of a model are divided at named tensors; what the loss does not need does not cross."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import ModelProto, helper

from splitonnx.errors import IntegerCut, NotACut
from splitonnx.partitioner.cutting.divisions import divide_inference, divide_training
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.graphs.readings import copy_model
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.u_shapes.pairs import inspect_pairs
from splitonnx.verifications import verify
from tests.support.small_models import hold_predictions, load_model
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


def build_cached() -> ModelProto:
    """Attention over the keys of earlier calls, which the model returns with its own ones."""
    net = Net()
    net.op("MatMul", "x", net.weight("in", 4, 5), out="h")
    net.op("MatMul", "h", net.weight("keys", 5, 5), out="k")
    net.op("Concat", "past", "k", out="present", axis=1)
    net.op("Transpose", "present", out="turned", perm=[0, 2, 1])
    net.op("Softmax", net.op("MatMul", "h", "turned", out="s"), out="shares", axis=-1)
    net.op("MatMul", net.op("MatMul", "shares", "present", out="mixed"),
           net.weight("mix", 5, 5), out="b")  # fmt: skip
    net.op("MatMul", net.op("Tanh", "b", out="t"), net.weight("out", 5, 3), out="y")
    model = net.finish({"x": (FLOAT, ["N", 2, 4]), "past": (FLOAT, ["N", "P", 5])}, "y", 2, 3)
    model.graph.output.append(helper.make_tensor_value_info("present", FLOAT, ["N", "Q", 5]))
    return model


def test_an_output_that_the_server_reads_on_comes_back_in_a_u_shape() -> None:
    model, random = build_cached(), np.random.default_rng(0)
    bundle = cut(model, at=("h", "past"), tail_at=("t", "present"), loss="mse")
    data = {
        "x": random.standard_normal((6, 2, 4), np.float32),
        "past": random.standard_normal((6, 3, 5), np.float32),
        "labels": random.standard_normal((6, 2, 3), np.float32),
    }
    hold_predictions(bundle, model, data)
    assert verify(bundle, data, steps=2, batch_size=3).ok


def test_an_output_that_the_server_computes_in_a_u_shape_is_named_with_what_lets_it_cross() -> None:
    with pytest.raises(NotACut, match=r"'present' would cross too; .* --tail-at as well"):
        cut(build_cached(), at=("h", "past"), tail_at="t", loss="mse")
    (pair,) = inspect_pairs(build_cached(), at=("h", "past"), tail_at=("t", "present"))
    assert pair.at == ("h", "past")
    assert pair.tail_at == ("t", "present")


def test_a_tensor_that_no_layer_of_the_client_reads_is_still_refused_at_the_tail() -> None:
    with pytest.raises(NotACut, match="the client's part does not use 's'"):
        cut(build_cached(), at=("h", "past"), tail_at=("t", "present", "s"), loss="mse")
