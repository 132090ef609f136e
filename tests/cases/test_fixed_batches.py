"""Models whose exporter saw one sample, and wrote its number into shapes or inputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest

from splitonnx.errors import ArrayMismatch, MixedSamples, UnsupportedModel
from splitonnx.names import Target
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.remarks import Kind
from splitonnx.runtime.client.clients import Client
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.nets import FLOAT, Net
from tests.support.small_models import (
    Arrays,
    evaluate,
    hold_predictions,
    hold_step,
    load_data,
    load_model,
)

BAKED, FIXED = "12_batch_baked", "42_fixed_batch"
TRAINED = ["w1", "b1", "w2", "b2"]


@pytest.mark.parametrize("target", TARGETS)
def test_a_batch_of_1_in_shapes_is_that_of_the_data(target: Target) -> None:
    model, data, meant = load_model(BAKED), load_data(BAKED), _write_freely(load_model(BAKED))
    np.testing.assert_allclose(evaluate(meant, data)["y"], _evaluate_each(model, data), rtol=1e-5)
    bundle = cut(model, at="a", client_target=target, server_target=target)
    hold_predictions(bundle, meant, data)
    hold_predictions(bundle, model, load_data(BAKED, 1))
    assert verify(bundle, data, batch_size=8).ok
    whole = cut(model, at=None, client_target=target, server_target=target)
    hold_step(whole, meant, load_data(BAKED, 4), TRAINED)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("option", ["N", "x:0"])
def test_a_batch_of_1_in_shapes_becomes_the_one_that_the_user_asks_for(
    option: str, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    model, data, meant = load_model(BAKED), load_data(BAKED), _write_freely(load_model(BAKED))
    if option == "x:0":
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    dims = {option: 4}
    assert check(model, dims=dims).trainable
    bundle = cut(model, at="a", dims=dims, client_target=target, server_target=target, check=True)
    assert f"--dim {option}=4: since the model's file takes a batch of 1 only" in caplog.text
    hold_predictions(bundle, meant, load_data(BAKED, 4))
    assert verify(bundle, data, batch_size=4).ok
    whole = cut(model, at=None, dims=dims, client_target=target, server_target=target)
    hold_step(whole, meant, load_data(BAKED, 4), TRAINED)


def test_it_is_said_which_shapes_they_are() -> None:
    (remark,) = check(load_model(BAKED)).remarks
    assert remark.kind is Kind.BATCH
    assert "'r', 'f' have a batch of 1" in remark.sentence


@pytest.mark.parametrize("target", TARGETS)
def test_a_batch_that_the_input_fixes_is_freed_as_the_remark_says(target: Target) -> None:
    model, data = load_model(FIXED), load_data(FIXED)
    bundle = cut(model, at="b", client_target=target, server_target=target)
    with pytest.raises(ArrayMismatch, match=r"'x' should be F32\[1, 4\].*`splitonnx check` says"):
        verify(bundle, data, batch_size=8)
    (remark,) = check(model).remarks
    assert remark.sentence.endswith("--dim x:0=N frees it")
    freed = cut(model, at="b", dims={"x:0": "N"}, client_target=target, server_target=target)
    meant = load_model(FIXED)
    for value in (meant.graph.input[0], meant.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    hold_predictions(freed, meant, data)
    assert verify(freed, data, batch_size=8).ok
    whole = cut(model, at=None, dims={"x:0": "N"}, client_target=target, server_target=target)
    hold_step(whole, meant, load_data(FIXED, 4), TRAINED)


def test_a_batch_that_stays_fixed_is_said_with_the_node() -> None:
    model = load_model(BAKED)
    shape = next(tensor for tensor in model.graph.initializer if tensor.name == "rs")
    shape.CopyFrom(onnx.numpy_helper.from_array(np.array([1, 1, 2, -1]), "rs"))  # fits any batch
    model.graph.node[2].attribute[0].ints[:] = [0, 1, 3, 2]
    (remark,) = check(model).remarks
    assert remark.sentence == "the batch is fixed at 1 by node 'r' (Reshape)"
    with pytest.raises(ArrayMismatch, match=r"'labels' should be I64\[1\].*`splitonnx check` says"):
        verify(cut(model, at="a"), load_data(BAKED), batch_size=8)


def _write_freely(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write the model with shapes that keep the batch."""
    for tensor in model.graph.initializer:
        if tensor.name in ("rs", "rs2"):
            sizes = onnx.numpy_helper.to_array(tensor).copy()
            sizes[0] = -1
            tensor.CopyFrom(onnx.numpy_helper.from_array(sizes, tensor.name))
    return model


def _evaluate_each(model: onnx.ModelProto, data: Arrays) -> np.ndarray:
    rows = [evaluate(model, {"x": data["x"][row : row + 1]})["y"] for row in range(len(data["x"]))]
    return np.concatenate(rows)


def build_fixed(kind: str) -> onnx.ModelProto:
    """Build a model of x [1, 5, 4] as an exporter writes it that saw one sample."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w", 4, 6), out="m")
    match kind:
        case "token":
            value = net.op("Concat", net.weight("token", 1, 1, 6), value, out="c", axis=1)
            value = net.op("Tanh", value, out="t")
            value = net.op("ReduceMean", value, net.constant("axis", np.array([1])), out="p")
            value = net.op("Reshape", value, net.constant("flat", np.array([1, 6])), out="f")
        case "steps first":
            value = net.op("Transpose", value, out="t", perm=[1, 0, 2])
            value = net.op("Reshape", value, net.constant("rows", np.array([-1, 6])), out="r")
            value = net.op("Reshape", value, net.constant("back", np.array([5, -1, 6])), out="b")
            value = net.op("CumSum", value, net.constant("axis", np.array(0)), out="s")
            value = net.op("ReduceMax", value, net.constant("first", np.array([0])), out="p")
            value = net.op("Squeeze", value, net.constant("none", np.array([0])), out="f")
        case "pool":
            flat = net.constant("flat", np.array([1, -1, 6]))
            value = net.op("Reshape", value, flat, out="r")
            value = net.op("ReduceMean", value, net.constant("axis", np.array([1])), out="p")
            value = net.op("Squeeze", value, net.constant("one", np.array([1])), out="f")
        case "similarity":
            value = net.op("Flatten", value, out="l")
            value = net.op("MatMul", value, net.weight("w2", 30, 6), out="l2")
            turned = net.op("Transpose", value, out="t", perm=[1, 0])
            weights = net.op("Softmax", net.op("MatMul", value, turned, out="q"), out="a", axis=-1)
            value = net.op("MatMul", weights, value, out="f")
    model = net.finish(
        {"x": (FLOAT, [1, 5, 4])}, net.op("MatMul", value, net.weight("v", 6, 3), out="y"), 3
    )
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    return model


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["token", "steps first"])
def test_a_freed_model_computes_for_each_sample_what_its_file_does(
    kind: str, target: Target
) -> None:
    model = build_fixed(kind)
    x = np.random.default_rng(1).standard_normal((7, 5, 4)).astype(np.float32)
    expected = _evaluate_each(model, {"x": x})
    bundle = cut(model, at=None, loss="mse", dims={"x:0": "N"}, client_target=target, check=True)
    with Client(bundle.client, threads=1) as client:
        np.testing.assert_allclose(client.predict({"x": x})["y"], expected, rtol=1e-5, atol=1e-6)
    merged = onnxruntime.InferenceSession(merge(bundle))
    np.testing.assert_allclose(merged.run(["y"], {"x": x})[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "node"), [("pool", "r_node"), ("similarity", "q_node")])
@pytest.mark.parametrize("size", ["N", 4])
def test_a_model_that_would_mix_samples_is_refused_and_its_option_not_advised(
    kind: str, node: str, size: int | str
) -> None:
    model = build_fixed(kind)
    with pytest.raises(MixedSamples) as caught:
        cut(model, at="m", loss="mse", dims={"x:0": size}, check=True)
    assert caught.value.node == node
    (remark,) = (each for each in check(model).remarks if each.kind is Kind.FIXED_BATCH)
    assert (f"node '{node}'" in remark.sentence, remark.options) == (True, ())
    (obstacle,) = check(model, dims={"x:0": size}).obstacles
    assert obstacle == str(caught.value)
    cut(model, at="m", loss="mse", check=True)  # one sample a batch is what the file means


def build_resized(rows: int, mode: str) -> onnx.ModelProto:
    """Build a model of x [N, 2, 4, 4] whose exporter saw ``rows`` samples; 0 keeps the batch."""
    net = Net()
    net.op("Conv", "x", net.weight("k", 3, 2, 1, 1), out="h")
    sizes = net.constant("sizes", np.array([rows, 3, 6, 5] if rows else [6, 5]))
    axes = {} if rows else {"axes": [2, 3]}
    net.op("Resize", "h", "", "", sizes, out="r", mode=mode, **axes)
    net.op("Flatten", net.op("Tanh", "r", out="t"), out="f")
    net.op("MatMul", "f", net.weight("v", 90, 3), out="y")
    inputs = [onnx.helper.make_tensor_value_info("x", FLOAT, ["N", 2, 4, 4])]
    outputs = [onnx.helper.make_tensor_value_info("y", FLOAT, ["N", 3])]
    graph = onnx.helper.make_graph(net.nodes, mode, inputs, outputs, net.weights)
    opsets = [onnx.helper.make_opsetid("", 18)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_an_image_is_not_resized_to_one_sample(
    mode: str, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    model, meant = build_resized(1, mode), build_resized(0, mode)
    x = np.random.default_rng(2).standard_normal((8, 2, 4, 4)).astype(np.float32)
    np.testing.assert_allclose(
        evaluate(meant, {"x": x})["y"], _evaluate_each(model, {"x": x}), rtol=1e-5, atol=1e-6
    )
    data: Arrays = {"x": x, "labels": np.arange(8) % 3}
    bundle = cut(model, at="h", client_target=target, server_target=target)
    assert [record.getMessage() for record in caplog.records] == [
        "'r_node' has a batch of 1 in the model's file, and could keep no other; it is taken for "
        "the batch of the data"
    ]
    hold_predictions(bundle, meant, data)
    assert verify(bundle, data, batch_size=4).ok
    whole = cut(model, at=None, client_target=target, server_target=target)
    hold_step(whole, meant, data, ["k", "v"])


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_an_image_resized_to_two_samples_is_refused_with_the_batch_that_it_takes(mode: str) -> None:
    model, meant = build_resized(2, mode), build_resized(0, mode)
    with pytest.raises(UnsupportedModel, match=r"'r_node' \(Resize\).*of 2,.*--dim N=2"):
        cut(model, at="h")
    x = np.random.default_rng(2).standard_normal((2, 2, 4, 4)).astype(np.float32)
    bundle = cut(model, at="h", dims={"N": 2})
    hold_predictions(bundle, meant, {"x": x})


def test_what_was_not_compared_is_said(caplog: pytest.LogCaptureFixture) -> None:
    cut(build_fixed("pool"), at="m", loss="mse", dims={"x:0": "N"}, check=False)
    assert "may mix samples, which was not checked" in caplog.text
    caplog.clear()
    cut(build_fixed("token"), at="m", loss="mse", dims={"x:1": "T"}, check=True)
    assert "--dim x:1=T: nodes that the exporter wrote for the fixed size" in caplog.text


def test_an_author_may_mix_the_samples_of_any_batch(caplog: pytest.LogCaptureFixture) -> None:
    model = build_fixed("similarity")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    cut(model, at="m", loss="mse", check=True)
    assert not caplog.records
    model.graph.node[1].op_type = "Reshape"  # from here on the file takes one sample only
    model.graph.node[1].input.append("one")
    del model.graph.node[1].attribute[:]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 30]), "one"))
    cut(model, at="m", loss="mse", check=True)
    assert "node 'q_node' (MatMul) of the model mixes samples" in caplog.text


def build_turned(rows: int | str) -> onnx.ModelProto:
    """Build a model of x [rows, 2, 4, 4] whose grids are written for one sample."""
    net = Net()
    flat = net.op("Flatten", net.op("Conv", "x", net.weight("k", 3, 2, 1, 1), out="h"), out="f")
    turns = net.op("MatMul", flat, net.weight("w", 48, 6), out="m")
    turns = net.op("Reshape", turns, net.constant("matrix", np.array([-1, 2, 3])), out="r")
    grid = net.op("AffineGrid", turns, net.constant("sizes", np.array([1, 3, 5, 5])), out="g")
    value = net.op("Flatten", net.op("GridSample", "h", grid, out="s"), out="l")
    net.op("MatMul", value, net.weight("v", 75, 3), out="y")
    inputs = [onnx.helper.make_tensor_value_info("x", FLOAT, [rows, 2, 4, 4])]
    outputs = [onnx.helper.make_tensor_value_info("y", FLOAT, [rows, 3])]
    graph = onnx.helper.make_graph(net.nodes, "turned", inputs, outputs, net.weights)
    opsets = [onnx.helper.make_opsetid("", 20)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["nearest", "linear", "turned", "turned freely"])
def test_images_of_one_sample_are_freed_as_the_remark_says(kind: str, target: Target) -> None:
    dims = {} if kind == "turned freely" else {"x:0": "N"}
    if kind.startswith("turned"):
        model = build_turned(1 if dims else "N")
    else:
        model = build_resized(1, kind)
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
        model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    (remark,) = check(model).remarks
    assert remark.options == (("--dim x:0=N",) if dims else ())
    x = np.random.default_rng(4).standard_normal((4, 2, 4, 4)).astype(np.float32)
    bundle = cut(model, at="h", dims=dims, client_target=target, server_target=target, check=True)
    expected = _evaluate_each(model, {"x": x})
    merged = onnxruntime.InferenceSession(merge(bundle))
    np.testing.assert_allclose(merged.run(["y"], {"x": x})[0], expected, rtol=1e-5, atol=1e-6)
    data: Arrays = {"x": x, "labels": np.arange(4) % 3}
    assert verify(bundle, data, batch_size=4).ok
