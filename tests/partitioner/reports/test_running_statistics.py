"""Running statistics that were never tracked, or never will be."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.reports.remarks import Kind, Remark
from splitonnx.partitioner.reports.running_statistics import remark_on_states, remark_on_statistics
from tests.support.carried import AVERAGES, build_averages, build_lstm
from tests.support.nets import FLOAT, Net


def build(
    *means: float, training: bool = True, momentum: float = 0.9, variance: float = 1.0
) -> onnx.ModelProto:
    """One BatchNormalization for each mean."""
    net, value = Net(), "x"
    for index, mean in enumerate(means):
        value = net.op("MatMul", value, net.weight(f"w{index}", 4, 4), out=f"m{index}")
        value = net.batchnorm(value, 4, out=f"n{index}", training=training)
        net.nodes[-1].attribute.append(helper.make_attribute("momentum", momentum))
        for tensor in net.weights[-2:]:
            number = mean if tensor.name.endswith("mean") else variance
            array = np.full(4, number, np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return net.finish({"x": (FLOAT, ["N", 4])}, value, 4)


def list_remarks(model: onnx.ModelProto) -> list[Remark]:
    return list(remark_on_statistics(prepare(open_model(model))))


def test_initial_statistics_are_told_if_every_node_has_them() -> None:
    (remark,) = list_remarks(build(0, 0))
    assert remark.kind is Kind.INITIAL_STATISTICS
    assert remark.names == ("n0.bn", "n1.bn")
    assert remark.options == ()
    assert list_remarks(build(0, 0.25)) == []
    assert list_remarks(build(0, variance=1.5)) == []


def test_frozen_they_normalise_nothing_and_training_them_is_offered() -> None:
    (remark,) = list_remarks(build(0, training=False))
    assert remark.options == ("--batchnorm train",)


def test_statistics_that_training_never_updates_are_told() -> None:
    (remark,) = list_remarks(build(0.25, momentum=1.0))
    assert remark.kind is Kind.UNTRACKED_STATISTICS
    assert "track_running_stats=False" in remark.sentence
    assert list_remarks(build(0.25, momentum=1.0, training=False)) == []


def test_statistics_that_share_a_tensor_with_a_parameter_are_told_with_what_was_done() -> None:
    model = build(0.5)
    node = next(n for n in model.graph.node if n.op_type == "BatchNormalization")
    node.input[4] = node.input[1]
    (remark,) = list_remarks(model)
    assert remark.kind is Kind.JOINED_PARAMETERS
    assert remark.names == ("n0.bn.scale", "n0.bn.running_var")
    assert "'n0.bn.scale', also the running variance of 'n0.bn'" in remark.sentence


def test_outputs_that_look_like_next_states_are_told_with_the_options() -> None:
    (remark,) = remark_on_states(prepare(open_model(build_lstm())), "y")
    assert remark.kind is Kind.STATE
    assert remark.options == ("--state hn=h0", "--state cn=c0")
    assert remark.names == ("hn", "h0", "cn", "c0")
    assert "'hn' that of 'h0' and 'cn' that of 'c0'" in remark.sentence


def test_states_that_are_carried_already_are_not_told_again() -> None:
    given = prepare(open_model(build_averages()))
    assert [remark.kind for remark in remark_on_states(given, "y")] == [Kind.STATE]
    assert not list(
        remark_on_states(prepare(open_model(build_averages()), states=[*AVERAGES.items()]), "y")
    )
