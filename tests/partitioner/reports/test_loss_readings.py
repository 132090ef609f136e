"""How a loss reads an output: activations that it skips or applies twice, the axis of classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from splitonnx.losses import Loss
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.loss_readings import TriedLosses, remark_on_losses
from splitonnx.partitioner.reports.remarks import Kind, Remark
from splitonnx.runtime.client.clients import Client
from tests.support.nets import FLOAT, Net

Tail = Sequence[tuple[str, list[str], dict[str, Any]]]


def read(model: onnx.ModelProto, kinds: Sequence[str], output: str) -> list[Remark]:
    """List the remarks on the first of some losses that fit an output."""
    tried = TriedLosses(
        trained=tuple(Loss(kind=kind, output=output) for kind in kinds[:1]),
        graphs={},
        outputs=(output,),
        fitting=tuple(kinds),
        obstacles=(),
    )
    return list(remark_on_losses(prepare(open_model(model)), tried))


def list_remarks(tail: Tail, *losses: str) -> list[Remark]:
    """Put operators behind scores of shape (N, 4)."""
    net = Net()
    net.constant("half", np.array(0.5, np.float32))
    net.constant("low", np.array(1e-7, np.float32))
    net.constant("high", np.array(1 - 1e-7, np.float32))
    value = net.op("MatMul", "x", net.weight("w", 4, 4), out="scores")
    for index, (kind, inputs, attributes) in enumerate(tail):
        value = net.op(kind, value, *inputs, out=f"t{index}", **attributes)
    model = net.finish({"x": (FLOAT, ["N", 4])}, value, 4)
    return read(model, losses, value)


@pytest.mark.parametrize(
    ("kind", "loss"), [("Softmax", "cross-entropy"), ("Sigmoid", "bce-with-logits")]
)
def test_an_activation_that_the_loss_skips_is_told(kind: str, loss: str) -> None:
    tails: list[Tail] = [[], [("Clip", ["low", "high"], {})], [("Identity", [], {})]]
    for behind in tails:
        (remark,) = list_remarks([(kind, [], {}), *behind], loss)
        assert remark.kind is Kind.ACTIVATION_SKIPPED
        assert "computed from 'scores'" in remark.sentence


def test_an_activation_that_cannot_be_skipped_would_squash_twice() -> None:
    for behind in ("Mul", "Add"):
        (remark,) = list_remarks([("Softmax", [], {}), (behind, ["half"], {})], "cross-entropy")
        assert remark.kind is Kind.ACTIVATION_TWICE
        assert "export the model with 'scores' as its output" in remark.sentence
        assert remark.options == ()


def test_a_softmax_over_another_axis_than_1_may_tell_the_axis_of_the_classes() -> None:
    net = Net()
    parted = net.constant("parted", np.array([-1, 3, 4]))
    scores = net.op("MatMul", "x", net.weight("w", 4, 12), out="h")
    net.op("Softmax", net.op("Reshape", scores, parted, out="s"), out="y", axis=2)
    model = net.finish({"x": (FLOAT, ["N", 4])}, "y", 3, 4)
    remark = next(one for one in check(model).remarks if one.kind is Kind.ACTIVATION_TWICE)
    assert remark.options == ("--class-axis 2",)
    data: dict[str, np.ndarray] = {
        "x": np.ones((2, 4), np.float32),
        "labels": np.zeros((2, 3), np.int64),
    }
    bundle = cut(model, at=None, class_axis=2)
    with Client(bundle.client, threads=1) as client:
        loss = float(client.step(data)["loss"])
        (predicted,) = client.predict([data]).values()
    weights = onnx.numpy_helper.to_array(model.graph.initializer[1])
    raw = (data["x"] @ weights).reshape(2, 3, 4)
    expected = -(raw[..., 0] - np.log(np.exp(raw).sum(-1))).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(predicted.sum(-1), 1, rtol=1e-5)


def test_only_scores_of_the_model_given_are_advised_as_its_output() -> None:
    (over_samples,) = list_remarks([("Softmax", [], {"axis": 0})], "cross-entropy")
    earlier = Net(opset=11)
    scores = earlier.op("MatMul", "x", earlier.weight("w", 4, 4), out="scores")
    earlier.op("Softmax", scores, out="y", axis=1)
    model = earlier.finish({"x": (FLOAT, ["N", 3, 4])}, "y", 3, 4)  # over all but the first axis
    others = read(model, ["cross-entropy"], "y")
    twice = [each for each in (over_samples, *others) if each.kind is Kind.ACTIVATION_TWICE]
    assert len(twice) == 2
    for remark in twice:
        assert remark.sentence.endswith(
            "choose another loss, or a model whose output is the raw scores"
        )


def test_the_scores_of_one_of_several_activations_are_not_advised() -> None:
    net = Net()
    for part in ("a", "b"):
        net.op("MatMul", "x", net.weight(f"{part}.w", 4, 2), out=f"{part}.scores")
        net.op("Softmax", f"{part}.scores", out=part, axis=1)
    model = net.finish({"x": (FLOAT, ["N", 4])}, net.op("Concat", "a", "b", out="y", axis=1), 4)
    (remark,) = read(model, ["cross-entropy"], "y")
    assert remark.kind is Kind.ACTIVATION_TWICE
    assert "scores' as its output" not in remark.sentence


def test_the_loss_that_skips_the_activation_is_offered() -> None:
    (remark,) = list_remarks([("Sigmoid", [], {})], "cross-entropy", "mse", "bce-with-logits")
    assert remark.kind is Kind.ACTIVATION_TWICE
    assert remark.options == ("--loss bce-with-logits",)


def test_raw_scores_and_losses_without_activation_call_for_no_remark() -> None:
    assert list_remarks([], "cross-entropy", "bce-with-logits") == []
    assert list_remarks([("Softmax", [], {})], "mse") == []
    assert list_remarks([("Softmax", [], {}), ("Mul", ["half"], {})], "l1") == []
    assert list_remarks([("LogSoftmax", [], {})], "cross-entropy") == []
    assert list_remarks([]) == []


def list_axes(source: str, shape: list[int | str], *dims: int) -> list[Remark]:
    net = Net()
    if source == "MatMul":
        value = net.op("MatMul", "x", net.weight("w", 4, dims[-1]), out="m")
        value = net.op("Add", value, net.weight("b", dims[-1]), out="y")
    else:
        value = net.op("Conv", "x", net.weight("w", dims[0], 4, 1), out="y")
    model = net.finish({"x": (FLOAT, shape)}, value, *dims)
    return read(model, ["cross-entropy"], "y")


def test_classes_on_the_last_axis_are_told_with_both_readings() -> None:
    for classes in (5, 7):
        (remark,) = list_axes("MatMul", ["N", 5, 4], 5, classes)
        assert remark.kind is Kind.CLASS_AXIS
        assert f"axis 1 (5 classes, labels (N, {classes})" in remark.sentence
        assert f"last axis ({classes} classes, labels (N, 5)" in remark.sentence
        assert remark.options == ("--class-axis 1", "--class-axis -1")


def test_channels_of_a_convolution_are_the_classes() -> None:
    assert list_axes("Conv", ["N", 4, 6], 7, 6) == []
    assert list_axes("MatMul", ["N", "T", 4], "T", 5) == []  # type: ignore[arg-type]


def test_a_sigmoid_of_several_nodes_whose_input_no_tensor_holds_is_told() -> None:
    """``half (tanh(x) + half)`` is no sigmoid, ``half tanh(x) + half`` is the one of ``2 x``."""
    tail: Tail = [("Tanh", [], {}), ("Mul", ["half"], {}), ("Add", ["half"], {})]
    (remark,) = list_remarks(tail, "bce-with-logits")
    assert remark.kind is Kind.ACTIVATION_TWICE
    assert "comes from the Sigmoid 't2_node'" in remark.sentence
    assert "export the model with the scores before it as its output" in remark.sentence
    assert list_remarks([tail[0], tail[2], tail[1]], "bce-with-logits") == []


def test_the_axis_of_classes_is_told_before_a_softmax_of_several_nodes() -> None:
    net = Net()
    net.constant("last", np.array([-1]))
    net.op("MatMul", "x", net.weight("w", 4, 5), out="m")
    net.op("Sub", "m", net.op("ReduceMax", "m", "last", out="top"), out="s")
    net.op("Exp", "s", out="e")
    net.op("Div", "e", net.op("ReduceSum", "e", "last", out="z"), out="y")
    model = net.finish({"x": (FLOAT, ["N", 6, 4])}, "y", 6, 5)
    remarks = read(model, ["cross-entropy"], "y")
    assert [remark.kind for remark in remarks][-1] is Kind.CLASS_AXIS


@pytest.mark.parametrize(("operator", "shape"), [("Conv", ["N", 4, 6]), ("MatMul", ["N", 6, 4])])
def test_scores_that_fit_both_axes_are_told_to_need_the_option(
    operator: str, shape: list[int | str]
) -> None:
    (remark,) = list_axes(operator, shape, 6, 6)
    assert "cross-entropy fits as well, but only with --class-axis" in remark.sentence
    assert ("as Conv makes them" in remark.sentence) is (operator == "Conv")


def test_check_says_why_a_segmentation_has_no_cross_entropy() -> None:
    net = Net()
    net.op("Conv", "x", net.weight("w", 4, 3, 1, 1), out="y")
    found = check(net.finish({"x": (FLOAT, ["N", 3, 4, 4])}, "y", 4, 4, 4))
    assert "cross-entropy" not in found.losses
    (remark,) = (remark for remark in found.remarks if remark.kind is Kind.CLASS_AXIS)
    assert remark.options == ("--class-axis 1", "--class-axis -1")


def build_heads() -> onnx.ModelProto:
    """Build two outputs behind one layer, a Softmax and scores with classes on their last axis."""
    net = Net()
    shared = net.op("MatMul", "x", net.weight("w", 4, 5), out="shared")
    net.op("Softmax", net.op("MatMul", shared, net.weight("v", 5, 3), out="s"), out="a", axis=2)
    net.op("MatMul", shared, net.weight("u", 5, 7), out="b")
    model = net.finish({"x": (FLOAT, ["N", 6, 4])}, "a", 6, 3)
    model.graph.output.append(helper.make_tensor_value_info("b", FLOAT, ["N", 6, 7]))
    return model


def test_the_losses_of_all_outputs_are_read_each_by_its_settings() -> None:
    named = Loss(kind="cross-entropy", output="a", class_axis=2, labels="one")
    other = Loss(kind="cross-entropy", output="b", labels="two")
    found = check(build_heads(), loss=[named, other]).remarks
    (skipped,) = [remark for remark in found if remark.kind is Kind.ACTIVATION_SKIPPED]
    assert skipped.names == ("a", "s")
    (axis,) = [remark for remark in found if remark.kind is Kind.CLASS_AXIS]
    assert axis.names == ("b",)
