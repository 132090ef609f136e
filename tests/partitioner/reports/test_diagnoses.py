"""What an exporter did is said: folded or frozen BatchNormalization, Dropout that is off."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from splitonnx.partitioner.gate.exporters import list_omissions
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.diagnoses import diagnose
from splitonnx.partitioner.reports.remarks import Kind
from tests.end_to_end.test_exports import FOLDER
from tests.partitioner.lowerings.test_integer_kernels import build_pairs
from tests.support.small_models import load_model
from tests.support.zoo import ZOO, Net


def list_kinds(source: onnx.ModelProto) -> list[Kind]:
    return [remark.kind for remark in diagnose(open_model(source))]


def build_deep(producer: str) -> onnx.ModelProto:
    """Eight convolutions and no normalization, as a folded network looks."""
    net, value = Net(), "x"
    for index in range(8):
        value = net.op("Conv", value, net.weight(f"w{index}", 2, 2, 1, 1), out=f"c{index}")
    model = net.finish({"x": (onnx.TensorProto.FLOAT, ["N", 2, 4, 4])}, value, 2, 4, 4)
    model.producer_name = producer
    return model


def test_a_deep_convolutional_network_without_normalization_was_folded() -> None:
    remark, call = diagnose(open_model(build_deep("pytorch")))
    assert remark.kind is Kind.NO_BATCHNORM
    assert "8 convolutions" in remark.sentence
    assert "splitonnx.torch.export(" in remark.sentence
    assert call.kind is Kind.EXPORT_CALL
    assert "do_constant_folding=False" in call.sentence
    (remark,) = diagnose(open_model(build_deep("")))
    assert remark.sentence.endswith(
        "an unnamed exporter folded it into them, and it is not trained"
    )


def test_what_is_in_training_mode_calls_for_no_remark() -> None:
    assert list_kinds(ZOO["dropout"].build()) == []
    assert list_kinds(onnx.load(FOLDER / "torch-cnn-legacy.onnx")) == []


def test_batchnorm_in_inference_mode_is_said() -> None:
    (remark,) = diagnose(open_model(ZOO["batchnorm_frozen"].build()))
    assert remark.kind is Kind.FROZEN_BATCHNORM
    assert "--batchnorm train" in remark.sentence


def test_batchnorm_by_the_statistics_of_the_batch_calls_for_no_remark() -> None:
    """The dynamo exporter writes so what has no running statistics."""
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w", 4, 6), out="h")
    axis = net.constant("axis", np.array([0]))
    mean = net.op("ReduceMean", hidden, axis, out="mean", keepdims=0)
    distance = net.op("Sub", hidden, mean, out="distance")
    square = net.op("Mul", distance, distance, out="square")
    variance = net.op("ReduceMean", square, axis, out="variance", keepdims=0)
    scale, bias = net.weight("scale", 6), net.weight("bias", 6)
    net.op("BatchNormalization", hidden, scale, bias, mean, variance, out="y")
    model = net.finish({"x": (onnx.TensorProto.FLOAT, ["N", 4])}, "y", 6)
    model.producer_name = "pytorch"
    opened = open_model(model)
    assert diagnose(opened) == []
    assert list_omissions(opened) == []
    assert [remark for remark in check(model).remarks if "batchnorm" in remark.kind] == []


@pytest.mark.parametrize("on", [None, False])
def test_a_dropout_that_is_off_is_said(on: bool | None) -> None:
    model = ZOO["dropout"].build()
    for node in model.graph.node:
        if node.op_type == "Dropout" and on is None:
            del node.input[2:]
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".on"):
            tensor.ClearField("int32_data")
            tensor.raw_data = b"\x00"
    (remark,) = diagnose(open_model(model))
    assert remark.kind is Kind.DROPOUT_OFF
    assert remark.sentence.startswith("2 Dropout nodes are off")


def test_scikit_learn_s_operators_are_said() -> None:
    assert list_kinds(onnx.load(FOLDER / "sklearn-pipeline.onnx")) == [Kind.DICTIONARIES]


def test_operators_of_onnx_runtime_are_said() -> None:
    (remark,) = diagnose(open_model(load_model("33_simplified_layernorm")))
    assert remark.kind is Kind.OPTIMIZED
    assert "1 nodes (SimplifiedLayerNormalization)" in remark.sentence


def test_what_pytorch_left_out_is_said_once_and_then_the_call_that_keeps_it() -> None:
    for name in ("torch-cnn-legacy-default", "torch-transformer-legacy-default"):
        remarks = diagnose(open_model(onnx.load(FOLDER / f"{name}.onnx")))
        kinds = [remark.kind for remark in remarks]
        assert len(set(kinds)) == len(kinds) >= 2
        assert kinds[-1] is Kind.EXPORT_CALL
        assert all("splitonnx.torch.export(" in remark.sentence for remark in remarks)


def test_batchnorm_that_dynamo_left_in_inference_mode_is_said_with_both_ways_out() -> None:
    remark, _ = diagnose(open_model(onnx.load(FOLDER / "torch-cnn-dynamo.onnx")))
    assert remark.kind is Kind.FROZEN_BATCHNORM
    assert "--batchnorm train" in remark.sentence
    assert "splitonnx.torch.export(" in remark.sentence


@pytest.mark.parametrize(("largest", "told"), [(64, False), (127, True)])
def test_weights_whose_products_may_saturate_are_said(largest: int, told: bool) -> None:
    remarks = [r for r in diagnose(open_model(build_pairs(largest))) if r.kind is Kind.SATURATION]
    assert [remark.names for remark in remarks] == [("w",)] * told
    for remark in remarks:
        assert "once merged: on x86 processors without VNNI" in remark.sentence
