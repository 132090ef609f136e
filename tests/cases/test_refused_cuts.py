"""Cuts that are refused name what stands in their way."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import splitonnx
from splitonnx.disclosures import list_sent
from splitonnx.errors import InputsNotPermitted, NotACut
from splitonnx.names import PREDICT, TRAIN, Target
from splitonnx.partitioner.cutting.divisions import divide_training
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.graphs.readings import copy_model
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import inspect
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.small_models import hold_predictions, hold_step, load_data, load_model
from tests.support.zoo import FLOAT, Net

PASSED_ON: dict[str, Callable[[Net], str]] = {
    "Identity": lambda net: net.op("Identity", "x", out="extra"),
    "Cast": lambda net: net.op("Cast", "x", out="extra", to=TensorProto.INT64),
    "two nodes": lambda net: net.op("Neg", net.op("Softmax", "x", out="s"), out="extra"),
    "a constant": lambda net: net.op("Add", "x", net.weight("offset", 4), out="extra"),
}
"""Second outputs that are computed from the raw input alone."""


def build_with(extra: Callable[[Net], str]) -> ModelProto:
    """Build two layers, whose activations are 'h', and a second output named 'extra'."""
    net = Net()
    hidden = net.op("Relu", net.op("MatMul", "x", net.weight("w1", 4, 6), out="m"), out="h")
    net.op("MatMul", hidden, net.weight("w2", 6, 4), out="y")
    extra(net)
    model = net.finish({"x": (FLOAT, ["N", 4])}, "y", 4)
    kinds = {n.output[0]: n.attribute[0].i for n in model.graph.node if n.op_type == "Cast"}
    kind = kinds.get("extra", FLOAT)
    model.graph.output.append(helper.make_tensor_value_info("extra", kind, ["N", 4]))
    return model


@pytest.mark.parametrize("name", PASSED_ON)
def test_what_passes_a_raw_input_on_stays_home(name: str) -> None:
    model = build_with(PASSED_ON[name])
    frozen = ["offset"] if name == "a constant" else []
    bundle = cut(model, at="h", loss="mse", freeze=frozen)
    manifest = bundle.client.manifest
    sent = [one for phase in (TRAIN, PREDICT) for one in list_sent(manifest, phase).tensors]
    assert {one.tensor for one in sent} == {"h", "labels"}
    data = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    hold_predictions(bundle, model, {"x": data})


@pytest.mark.parametrize("name", ["Identity", "Cast", "two nodes"])
def test_inspect_lists_such_a_cut_without_the_raw_input(name: str) -> None:
    model = build_with(PASSED_ON[name])
    for sent in ([], ["x"]):
        assert ("h", ()) in [(found.tensor, found.sent) for found in inspect(model, sent=sent)]


def test_an_output_that_reads_a_raw_input_beyond_the_cut_needs_it_there() -> None:
    model = build_with(lambda net: net.op("Add", "x", "y", out="extra"))
    assert inspect(model) == []
    with pytest.raises(NotACut) as refused:
        cut(model, at="h", loss="mse")
    assert "'h' does not divide the model: 'x' would cross too" in str(refused.value)
    assert "stays home" in str(refused.value)
    (found,) = [one for one in inspect(model, sent=["x"]) if one.tensor == "h"]
    assert found.sent == ("x",)
    assert cut(model, at=["h", "x"], loss="mse").server


def test_what_a_loss_reads_is_computed_where_the_loss_is() -> None:
    prepared = prepare(open_model(build_with(PASSED_ON["two nodes"])))
    graph = copy_model(prepared.training).graph
    with pytest.raises(NotACut) as refused:
        divide_training(prepared, graph, ["h"], (), ["y", "extra"])
    assert refused.value.raw == ["x"]


@pytest.mark.parametrize("at", ["b", ["b", "x"]])
@pytest.mark.parametrize("target", TARGETS)
def test_with_and_without_the_raw_input_it_trains_split_as_unsplit(
    target: Target, at: str | list[str]
) -> None:
    model, data = load_model("34_passed_through"), load_data("34_passed_through")
    bundle = cut(model, at=at, client_target=target, server_target=target)
    hold_predictions(bundle, model, data)
    assert verify(bundle, data, batch_size=8).ok
    whole = cut(model, at=None, client_target=target, server_target=target)
    hold_predictions(whole, model, data)
    hold_step(whole, model, load_data("34_passed_through", 4), ["w1", "b1", "w2", "b2"])


def test_lengths_that_choose_the_last_state_are_said_to_reach_it_past_every_layer() -> None:
    random = np.random.default_rng(0)
    weights = {"W": (1, 15, 3), "R": (1, 15, 5), "v": (5, 2)}
    arrays = [
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        for name, shape in weights.items()
    ]
    nodes = [
        helper.make_node("GRU", ["x", "W", "R", "", "lens"], ["", "last"], hidden_size=5),
        helper.make_node("MatMul", ["last", "v"], ["y"]),
    ]
    info = helper.make_tensor_value_info
    inputs = [info("x", FLOAT, ["T", "N", 3]), info("lens", TensorProto.INT32, ["N"])]
    graph = helper.make_graph(nodes, "g", inputs, [info("y", FLOAT, [1, "N", 2])], arrays)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    with pytest.raises(InputsNotPermitted) as caught:
        splitonnx.cut(model, at="last", send_labels=True, loss="mse")
    assert caught.value.inputs == ["lens"]  # of 'x', only what the layer made of it leaves
    told = str(caught.value)
    assert "'last', computed on a path without a layer of weights from the raw input 'lens'" in told
    assert told.endswith("else cut behind the next layer with weights on this path")
