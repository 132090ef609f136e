"""Quantised models: straight-through gradients, and integers before and after training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.errors import IntegerCut, UnsupportedModel
from splitonnx.names import Target
from splitonnx.optimizers import SGD
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import inspect
from splitonnx.verifications import verify
from tests.support.derivatives import close_net, draw_labels, take_step
from tests.support.zoo import ZOO, Net

X = np.random.default_rng(0).uniform(-2, 2, (6, 4)).astype(np.float32)


@cache
def quantize(name: str, per_channel: bool) -> onnx.ModelProto:
    """Quantise a model of the zoo as onnxruntime.quantization does, statically, in QDQ form."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches: Iterator[Mapping[str, np.ndarray]] = iter(
                [{n: a for n, a in ZOO[name].data(8, seed=s).items() if n != "labels"}
                 for s in range(3)]
            )  # fmt: skip

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(self._batches, None)

    with TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "quantised.onnx")
        onnx.save(ZOO[name].build(), source)
        quantize_static(
            source, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=per_channel
        )
        return onnx.load(target)


QUANTISED = [("chain", False), ("convolutions", True), ("convolutions", False)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "per_channel", "target", "places"),
    [
        ("chain", False, "training", (8,)),
        ("chain", False, "portable", (1, -2)),
        ("convolutions", True, "portable", (6,)),
        ("convolutions", False, "training", (4, -4)),
        ("attention", True, "portable", (0, -2)),
    ],
)
def test_a_quantised_model_trains_as_the_whole(
    name: str, per_channel: bool, target: Target, places: tuple[int, ...]
) -> None:
    model = quantize(name, per_channel)
    cuts = [found.tensor for found in inspect(model)]
    at, *tail = (cuts[place] for place in places)
    bundle = cut(
        model, at=at, tail_at=tail, loss=ZOO[name].loss, client_target=target, server_target=target
    )
    data = ZOO[name].data(16)
    assert verify(bundle, data, steps=2, batch_size=8).largest_difference <= 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "per_channel"), QUANTISED)
def test_an_untrained_quantised_model_comes_back_as_it_was(name: str, per_channel: bool) -> None:
    model = quantize(name, per_channel)
    merged = onnx.load_from_string(merge(cut(model, at=None, loss=ZOO[name].loss)))
    was = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    now = {t.name: numpy_helper.to_array(t) for t in merged.graph.initializer}
    weights = [n for n, a in was.items() if n.endswith("_quantized") and a.dtype == np.int8]
    assert weights
    for weight in weights:
        np.testing.assert_array_equal(now[weight], was[weight])
        assert now[weight].dtype == np.int8
    data = {n: a for n, a in ZOO[name].data(8).items() if n != "labels"}
    # Fused integer kernels saturate on processors without VNNI; both take the same ones below that.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    results = [
        onnxruntime.InferenceSession(m.SerializeToString(), options).run(None, data)[0]
        for m in (model, merged)
    ]
    np.testing.assert_array_equal(results[0], results[1])


def pair(
    net: Net, source: str, scale: object, zero: object, *, name: str, **attributes: int
) -> str:
    """Quantise and dequantise a tensor."""
    settings = [
        net.constant(f"{name}.scale", np.array(scale, np.float32)),
        net.constant(f"{name}.zero", np.array(zero)),
    ]
    net.op("QuantizeLinear", source, *settings, out=f"{name}.q", **attributes)
    return net.op("DequantizeLinear", f"{name}.q", *settings, out=f"{name}.dq", **attributes)


def test_the_gradient_passes_inside_the_range_and_not_outside() -> None:
    net = Net(opset=19)
    w = np.linspace(-1.5, 1.5, 20).reshape(4, 5).astype(np.float32)
    inputs = pair(net, "x", 0.02, np.uint8(128), name="in")
    weights = pair(net, net.constant("w", w), [0.01, 0.005, 0.02, 0.01], [np.int8(0)] * 4,
                   name="weights", axis=0)  # fmt: skip
    net.op("MatMul", inputs, weights, out="h")
    pair(net, "h", 0.03, np.int8(5), name="out")
    net.op("Identity", "out.dq", out="y")
    model = close_net(net, {"x": X})
    y, h, fixed = evaluate(model, "h", "in.dq")
    low, high = (-128 - 5) * np.float32(0.03), (127 - 5) * np.float32(0.03)
    pull = 2 * (y - draw_labels(model, {"x": X})) / y.size * ((h >= low) & (h <= high))
    scales = np.array([0.01, 0.005, 0.02, 0.01], np.float32)[:, None]
    inside = (w >= -128 * scales) & (w <= 127 * scales)
    assert 0 < inside.sum() < inside.size
    for found in take_step(model, {"x": X}):
        np.testing.assert_allclose(found["w_grad"], fixed.T @ pull * inside, rtol=1e-4, atol=1e-6)


def evaluate(model: onnx.ModelProto, *names: str) -> list[np.ndarray]:
    """Return a model's output, and further values of it, by onnx's own evaluator."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    results = ReferenceEvaluator(copy).run(None, {"x": X})
    assert isinstance(results, list)
    return results


def test_integers_that_are_moved_between_the_two_of_a_pair() -> None:
    net = Net(opset=19)
    h = net.op("MatMul", "x", net.weight("w", 4, 4), out="h")
    scale, zero = net.constant("s", np.array(0.05, np.float32)), net.constant("z", np.array(0, "b"))
    net.op("QuantizeLinear", h, scale, zero, out="q")
    net.op("Transpose", "q", out="turned", perm=[1, 0])
    net.op("Gather", "turned", net.constant("i", np.array([2, 0])), out="some", axis=0)
    net.op("DequantizeLinear", "some", scale, zero, out="y")
    model = close_net(net, {"x": X})
    (y,) = evaluate(model)
    pull = 2 * (y - draw_labels(model, {"x": X})) / y.size
    expected = np.zeros((4, 4))
    expected[:, [2, 0]] = X.T @ pull.T
    for found in take_step(model, {"x": X}):
        np.testing.assert_allclose(found["w_grad"], expected, rtol=1e-4, atol=1e-6)


def test_a_range_that_is_found_anew_each_time_lets_every_gradient_pass() -> None:
    net = Net(opset=19)
    net.op("MatMul", "x", net.weight("w", 4, 3), out="h")
    net.nodes.append(helper.make_node("DynamicQuantizeLinear", ["h"], ["q", "s", "z"], name="dyn"))
    net.op("DequantizeLinear", "q", "s", "z", out="y")
    model = close_net(net, {"x": X})
    (y,) = evaluate(model)
    pull = 2 * (y - draw_labels(model, {"x": X})) / y.size
    for found in take_step(model, {"x": X}):
        np.testing.assert_allclose(found["w_grad"], X.T @ pull, rtol=1e-4, atol=1e-6)


def hold_integers(dtype: int, opset: int, **attributes: int) -> Net:
    """A product with a weight of integers, blocked along its first axis where so asked."""
    net = Net(opset=opset)
    values = np.random.default_rng(1).integers(-8, 8, (4, 3))
    rows = 2 if attributes else 1
    net.weights.append(helper.make_tensor("w", dtype, (4, 3), values.flatten().tolist()))
    net.constant("s", np.linspace(0.1, 0.3, rows * 3).reshape(rows, 3).astype("f").squeeze())
    net.op("DequantizeLinear", "w", "s", out="floats", axis=0 if attributes else 1, **attributes)
    net.op("MatMul", "x", "floats", out="y")
    return net


@pytest.mark.parametrize(
    ("dtype", "opset", "attributes"),
    [
        (TensorProto.INT8, 19, {}),
        (TensorProto.INT8, 21, {"block_size": 2}),
        (TensorProto.INT4, 21, {"block_size": 2}),
        (TensorProto.INT16, 21, {}),
        (TensorProto.FLOAT8E4M3FN, 19, {}),
        (TensorProto.FLOAT8E4M3FNUZ, 19, {}),
        (TensorProto.FLOAT8E5M2, 21, {"block_size": 2}),
        (TensorProto.FLOAT8E5M2FNUZ, 19, {}),
    ],
)
def test_integer_weights_of_any_kind_train_and_come_back(
    dtype: int, opset: int, attributes: dict[str, int]
) -> None:
    model = close_net(hold_integers(dtype, opset, **attributes), {"x": X})
    (y,) = evaluate(model)
    expected = X.T @ (2 * (y - draw_labels(model, {"x": X})) / y.size)
    for found in take_step(model, {"x": X}):
        np.testing.assert_allclose(found["w_grad"], expected, rtol=1e-4, atol=1e-6)
    merged = onnx.load_from_string(merge(cut(model, at=None, loss="mse")))
    weights = {tensor.name: tensor for tensor in merged.graph.initializer}
    assert weights["w"].data_type == dtype
    before = numpy_helper.to_array(model.graph.initializer[0]).astype(int)
    np.testing.assert_array_equal(numpy_helper.to_array(weights["w"]).astype(int), before)


def test_integers_in_a_constant_node_train_and_come_back() -> None:
    stored = close_net(hold_integers(TensorProto.INT8, 19), {"x": X})
    model = onnx.ModelProto()
    model.CopyFrom(stored)
    (held,) = [tensor for tensor in model.graph.initializer if tensor.name == "w"]
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=held))
    model.graph.initializer.remove(held)
    for found, expected in zip(
        take_step(model, {"x": X}), take_step(stored, {"x": X}), strict=True
    ):
        np.testing.assert_array_equal(found["w_grad"], expected["w_grad"])
    merged = onnx.load_from_string(merge(cut(model, at=None, loss="mse")))
    (weight,) = [tensor for tensor in merged.graph.initializer if tensor.name == "w"]
    np.testing.assert_array_equal(numpy_helper.to_array(weight), numpy_helper.to_array(held))


def test_a_weight_that_two_nodes_dequantize_alike_is_one_parameter() -> None:
    net = hold_integers(TensorProto.INT8, 19)
    net.op("DequantizeLinear", "w", "s", out="again")
    net.op("MatMul", "x", "again", out="more")
    net.op("Add", "y", "more", out="sum")
    model = close_net(net, {"x": X}, output="sum")
    (total,) = evaluate(model)
    expected = X.T @ (2 * 2 * (total - draw_labels(model, {"x": X})) / total.size)
    for found in take_step(model, {"x": X}):
        np.testing.assert_allclose(found["w_grad"], expected, rtol=1e-4, atol=1e-6)
    merged = onnx.load_from_string(merge(cut(model, at=None, loss="mse")))
    np.testing.assert_array_equal(evaluate(merged)[0], total)


def test_integers_of_32_bits_become_floats() -> None:
    net = Net(opset=19)
    net.constant("b", np.array([100, -200, 300], np.int32))
    net.op("DequantizeLinear", "b", net.constant("s", np.array(0.01, np.float32)), out="bias")
    net.op("Gemm", "x", net.weight("w", 4, 3), "bias", out="y")
    bundle = cut(close_net(net, {"x": X}), at=None, loss="mse", optimizer=SGD(lr=0.1))
    np.testing.assert_array_equal(bundle.client.weights["bias"], np.array([1, -2, 3], np.float32))
    merged = onnx.load_from_string(merge(bundle))
    assert [node.op_type for node in merged.graph.node] == ["Gemm"]


def test_no_cut_at_integers_behind_a_parameter_is_offered_or_taken() -> None:
    net = Net(opset=19)
    net.op("MatMul", "x", net.weight("w", 4, 3), out="h")
    pair(net, "h", 0.05, np.int8(0), name="middle")
    net.op("MatMul", "middle.dq", net.weight("v", 3, 2), out="y")
    model = close_net(net, {"x": X})
    assert [found.tensor for found in inspect(model)] == ["h", "middle.dq"]
    with pytest.raises(IntegerCut, match=r"'middle.q' is INT8 and carries no gradient"):
        cut(model, at="middle.q", loss="mse")


def test_raw_data_may_cross_as_integers() -> None:
    net = Net(opset=19)
    source = pair(net, "x", 0.02, np.uint8(128), name="in")
    net.op("MatMul", source, net.weight("w", 4, 3), out="y")
    bundle = cut(close_net(net, {"x": X}), at="in.q", loss="mse")
    wires = bundle.client.manifest.phase("train").wires
    assert ("in.q@server", "U8") in [(wire.tensor.name, wire.tensor.dtype) for wire in wires]


def test_arithmetic_with_integers_behind_a_parameter_is_refused() -> None:
    net = Net(opset=19)
    net.op("MatMul", "x", net.weight("w", 4, 3), out="h")
    net.nodes.append(helper.make_node("DynamicQuantizeLinear", ["h"], ["q", "s", "z"], name="dyn"))
    net.constant("v", np.ones((3, 2), np.int8))
    net.op("MatMulInteger", "q", "v", "z", out="i")
    net.op("Mul", net.op("Cast", "i", out="f", to=1), "s", out="y")
    with pytest.raises(UnsupportedModel, match=r"'i_node' \(MatMulInteger\).*--dequantize"):
        cut(close_net(net, {"x": X}), at=None, loss="mse")


def test_a_model_whose_weights_are_all_integers_is_refused() -> None:
    net = Net(opset=19)
    net.nodes.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="dyn"))
    net.constant("v", np.ones((4, 2), np.int8))
    net.op("MatMulInteger", "q", "v", "z", out="i")
    net.op("Mul", net.op("Cast", "i", out="f", to=1), "s", out="y")
    with pytest.raises(UnsupportedModel, match=r"nothing of this model can be trained; turn"):
        cut(close_net(net, {"x": X}), at=None, loss="mse")


def test_integers_that_are_pooled_between_the_two_of_a_pair_are_refused() -> None:
    net = Net(opset=19)
    net.op("Conv", "x", net.weight("w", 2, 1, 2, 2), out="h")
    scale, zero = net.constant("s", np.array(0.05, np.float32)), net.constant("z", np.array(0, "b"))
    net.op("QuantizeLinear", "h", scale, zero, out="q")
    net.op("MaxPool", "q", out="p", kernel_shape=[2, 2])
    net.op("DequantizeLinear", "p", scale, zero, out="y")
    with pytest.raises(UnsupportedModel, match=r"through node 'p_node' \(MaxPool\)"):
        cut(close_net(net, {"x": np.ones((2, 1, 5, 5), np.float32)}), at=None, loss="mse")


def test_a_scale_that_is_computed_is_refused() -> None:
    net = Net(opset=19)
    h = net.op("MatMul", "x", net.weight("w", 4, 3), out="h")
    net.op("ReduceMax", "x", out="s", keepdims=0)
    zero = net.constant("z", np.array(0, np.int8))
    net.op("QuantizeLinear", h, "s", zero, out="q")
    net.op("DequantizeLinear", "q", "s", zero, out="y")
    with pytest.raises(UnsupportedModel, match=r"its scale or zero point is not a constant"):
        cut(close_net(net, {"x": X}), at=None, loss="mse")
