"""A cut, a model or data that cannot be used get a clear error that names what is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.errors import (
    ArrayMismatch,
    ForbiddenExternalData,
    IntegerCut,
    MissingArray,
    NotACut,
    NotAModel,
    NotDifferentiable,
    NotFinite,
    SharedParameter,
    UnknownTensor,
    UnsupportedModel,
    UsageError,
    ValueOutOfRange,
)
from splitonnx.partitioner.differentiation.gradients import differentiate
from splitonnx.partitioner.partitions import cut
from tests.support.links import link, make_bundle
from tests.support.zoo import FLOAT, ZOO, Net

# --- the cut --------------------------------------------------------------------------------


def test_a_name_that_is_not_in_the_model_is_refused_and_the_nearest_are_offered() -> None:
    with pytest.raises(UnknownTensor) as caught:
        cut(ZOO["chain"].build(), at="act11")
    assert "act1" in caught.value.nearest
    assert "did you mean 'act1'" in str(caught.value)


def test_tensors_that_are_no_cut_are_refused_and_the_missing_are_named() -> None:
    with pytest.raises(NotACut) as caught:
        cut(ZOO["residual"].build(), at="m2")
    assert list(caught.value.missing) == ["r1"]
    assert "'r1' would cross" in str(caught.value)


def test_an_input_that_the_server_reads_must_be_named_to_cross() -> None:
    with pytest.raises(NotACut) as caught:
        cut(ZOO["two_inputs"].build(), at="ta")
    assert list(caught.value.missing) == ["rb"] or list(caught.value.missing) == ["b"]


def test_a_tail_that_leaves_the_body_elsewhere_is_refused() -> None:
    with pytest.raises(NotACut) as caught:
        cut(ZOO["residual"].build(), at="m1", tail_at="m2")
    assert list(caught.value.missing) == ["r1"]


def test_a_tail_before_the_head_is_refused() -> None:
    with pytest.raises(NotACut, match="does not use 'act2'"):
        cut(ZOO["chain"].build(), at="act2", tail_at="act0")


def test_a_tail_without_a_head_is_refused() -> None:
    with pytest.raises(UsageError, match="--at"):
        cut(ZOO["chain"].build(), at=None, tail_at="act1")


def test_the_models_own_output_leaves_nothing_for_the_server() -> None:
    with pytest.raises(NotACut, match="nothing would be left"):
        cut(ZOO["chain"].build(), at="linear4")


def test_a_cut_at_integers_behind_trained_parameters_is_refused() -> None:
    net = Net()
    value = net.op("MatMul", "x", net.weight("w1", 4, 6), out="scores")
    net.op("ArgMax", value, out="choice", axis=1, keepdims=0)
    net.op("Gather", net.weight("table", 6, 3), "choice", out="picked")
    output = net.op("MatMul", "picked", net.weight("w2", 3, 2), out="y")
    with pytest.raises(IntegerCut) as caught:
        cut(net.finish({"x": (FLOAT, ["N", 4])}, output, 2), at="choice")
    assert list(caught.value.parameters) == ["w1"]


def test_a_trained_weight_on_both_sides_is_refused_unless_frozen() -> None:
    net = Net()
    weight = net.weight("tied", 5, 5)
    value = net.op("Tanh", net.op("MatMul", "x", weight, out="m1"), out="t1")
    output = net.op("MatMul", value, weight, out="y")
    model = net.finish({"x": (FLOAT, ["N", 5])}, output, 5)
    with pytest.raises(SharedParameter) as caught:
        cut(model, at="t1")
    assert list(caught.value.parameters) == ["tied"]
    assert cut(model, at="m1", tail_at="t1").server is not None  # both uses on the client
    with pytest.raises(UsageError, match="nothing is left to train"):
        cut(model, at="t1", freeze=["tied"])


# --- the model ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Atan", "Floor"])  # known here, and to the builder alone
def test_an_operator_that_was_not_rewritten_is_named_with_its_node(kind: str) -> None:
    net = Net()
    value = net.op(kind, "w", out="bent")
    net.op("ReduceSum", value, out="loss", keepdims=0)
    weight, loss = (
        helper.make_tensor_value_info(name, FLOAT, shape)
        for name, shape in (("w", [4]), ("loss", []))
    )
    graph = helper.make_graph(net.nodes, "case", [weight], [loss])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    with pytest.raises(NotDifferentiable) as caught:
        differentiate(ir.from_proto(model), ["w"], "loss")
    assert (caught.value.node, caught.value.operator) == ("bent_node", kind)


def build_conditional(*, trained: bool) -> onnx.ModelProto:
    """An If that no gradient can pass through, because its branches draw random numbers."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w", 4, 4), out="m") if trained else "x"
    doubled = helper.make_node("Add", [value, value], ["doubled"], name="inner")
    kept = helper.make_node("Identity", [value], ["kept"], name="other")
    noise = helper.make_node("RandomNormalLike", [value], ["noise"], name="drawn")
    output = helper.make_tensor_value_info
    bodies = [
        helper.make_graph([noise, node], name, [], [output(node.output[0], FLOAT, ["N", 4])])
        for node, name in ((doubled, "then"), (kept, "else"))
    ]
    most = net.op("ReduceMax", "x", out="most", keepdims=0)
    flag = net.op("Greater", most, net.constant("bound", np.array(0.5, np.float32)), out="flag")
    net.nodes.append(
        helper.make_node("If", [flag], ["chosen"], name="choice", then_branch=bodies[0],
                         else_branch=bodies[1])
    )  # fmt: skip
    hidden = net.op("Tanh", net.op("MatMul", "chosen", net.weight("w1", 4, 4), out="m1"), out="t")
    final = net.op("MatMul", hidden, net.weight("w2", 4, 2), out="y")
    return net.finish({"x": (FLOAT, ["N", 4])}, final, 2)


def test_an_if_in_the_trained_region_is_refused_before_it_aborts_the_process() -> None:
    with pytest.raises(NotDifferentiable) as caught:
        cut(build_conditional(trained=True), at="t")
    assert (caught.value.node, caught.value.operator) == ("choice", "If")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07" * 40, bytes(1000)])
def test_bytes_that_are_no_model_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    for source in (content, path):
        with pytest.raises(NotAModel):
            cut(source, at="x")


def test_a_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAModel, match="No such file"):
        cut(tmp_path / "absent.onnx", at="x")


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/hostname", "*/_ORT_MEM_ADDR_/*"])
def test_external_data_outside_the_models_folder_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    folder = tmp_path / "models"
    folder.mkdir()
    model = ZOO["chain"].build()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ForbiddenExternalData) as caught:
        cut(folder / "model.onnx", at="act1")
    assert caught.value.location == location


def test_external_data_inside_the_models_folder_is_read(tmp_path: Path) -> None:
    model = ZOO["chain"].build()
    onnx.save(
        model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin",
        size_threshold=0,
    )  # fmt: skip
    bundle = cut(tmp_path / "model.onnx", at="act1")
    expected = {t.name: numpy_helper.to_array(t) for t in ZOO["chain"].build().graph.initializer}
    for name, array in bundle.client.weights.items():
        np.testing.assert_array_equal(array, expected[name])


def test_an_unknown_loss_output_or_pattern_is_refused() -> None:
    model = ZOO["chain"].build()
    with pytest.raises(UsageError, match="there is no loss 'hinge'"):
        cut(model, at="act1", loss="hinge")
    with pytest.raises(UsageError, match="no output 'z'"):
        cut(model, at="act1", output="z")
    with pytest.raises(UnsupportedModel, match="no parameter"):
        cut(model, at="act1", freeze=["nothing"])
    with pytest.raises(UsageError, match="no target"):
        cut(model, at="act1", client_target="phone")  # type: ignore[arg-type]


# --- the data -------------------------------------------------------------------------------


def test_data_without_an_input_are_refused_by_name() -> None:
    client, _ = link(make_bundle())
    with client, pytest.raises(MissingArray) as caught:
        client.fit({"y": np.zeros((4, 6), np.float32)})
    assert caught.value.name == "x"


@pytest.mark.parametrize(
    "array", [np.zeros((4, 5), np.float32), np.zeros((4, 6)), np.zeros((4, 6, 1), np.float32)]
)
def test_data_of_another_shape_or_dtype_are_refused(array: np.ndarray) -> None:
    client, _ = link(make_bundle())
    data: dict[str, np.ndarray] = {"x": array, "labels": np.zeros(4, np.int64)}
    with client, pytest.raises(ArrayMismatch, match=r"F32\[N, 6\]"):
        client.fit(data)


def test_nan_in_a_batch_is_refused_and_nothing_is_updated() -> None:
    bundle = make_bundle()
    client, server = link(bundle)
    data = ZOO["chain"].data(8)
    data["x"][3, 2] = np.nan
    with client, pytest.raises(NotFinite, match="'x'"):
        client.fit(data)
    assert (client.steps, server.step) == (0, 0)


@pytest.mark.parametrize("label", [-1, 4])
@pytest.mark.parametrize("tail", [(), "act3"])
def test_labels_out_of_range_are_refused(label: int, tail: str) -> None:
    client, server = link(cut(ZOO["chain"].build(), at="act1", tail_at=tail))
    data = ZOO["chain"].data(8)
    data["labels"][5] = label
    with client, pytest.raises(ValueOutOfRange, match="allowed are 0 to 3"):
        client.fit(data)
    assert (client.steps, server.step) == (0, 0)
