"""Sizes and values of inputs are changed before a model is checked."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.errors import SplitonnxError, UsageError
from splitonnx.partitioner.gate.adjustments import Adjustments, Binding, adjust
from splitonnx.partitioner.gate.gates import open_model, read_original
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.verifications import verify
from tests.support.nets import FLOAT, Net
from tests.support.small_models import evaluate, load_data, load_model


def build(*dims: int | str) -> onnx.ModelProto:
    """Build y = relu(x * w) * scale over an input of some sizes, to which 4 is added."""
    net = Net()
    hidden = net.op("Relu", net.op("MatMul", "x", net.weight("w", 4, 3), out="m"), out="hidden")
    output = net.op("Mul", hidden, "scale", out="y")
    model = net.finish(
        {"x": (FLOAT, ["N", *dims[1:], 4]), "scale": (FLOAT, [3])}, output, *dims[1:], 3
    )
    for value in (model.graph.input[0], model.graph.output[0]):
        if isinstance(dims[0], int):
            value.type.tensor_type.shape.dim[0].dim_value = dims[0]
    return onnx.shape_inference.infer_shapes(model)


def read_dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_a_symbol_gets_its_size_wherever_it_stands() -> None:
    model = build("N", "T")
    adjust(model, Adjustments(dims={"T": 7}))
    values = (model.graph.input[0], model.graph.output[0], *model.graph.value_info)
    assert all(read_dims(value)[:2] == ["N", 7] for value in values)


def test_a_fixed_axis_becomes_a_symbol_and_what_was_inferred_is_forgotten() -> None:
    model = build(1)
    adjust(model, Adjustments(dims={"x:0": "N"}))
    assert read_dims(model.graph.input[0]) == ["N", 4]
    assert not model.graph.value_info
    assert read_dims(model.graph.output[0]) == [0, 0]
    open_model(model)


def test_a_model_exported_for_one_sample_trains_with_many_once_its_batch_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, data = load_model("42_fixed_batch"), load_data("42_fixed_batch")
    (given,) = [value.name for value in model.graph.input]
    bundle = cut(model, at=None, dims={f"{given}:0": "N"}, check=True)
    assert bundle.manifest.recipe.dims == {f"{given}:0": "N"}
    assert not caplog.records  # its samples are compared
    assert verify(bundle, data, batch_size=8).ok
    with Client(bundle.client, threads=1) as client:
        found = client.predict({given: data[given]})
    for row in range(3):
        expected = evaluate(load_model("42_fixed_batch"), {given: data[given][row : row + 1]})
        for name, array in expected.items():
            np.testing.assert_allclose(found[name][row : row + 1], array, rtol=1e-5, atol=1e-6)


def test_a_length_that_is_fixed_lets_a_recurrence_be_trained() -> None:
    model, data = load_model("11_lstm_dynamic_time"), load_data("11_lstm_dynamic_time")
    (given,) = [value.name for value in model.graph.input]
    symbols = [dim for dim in read_dims(model.graph.input[0]) if isinstance(dim, str)]
    length = data[given].shape[1]
    bundle = cut(model, at=None, dims={symbols[1]: length}, check=True)
    assert verify(bundle, data, batch_size=8, steps=2).ok


@pytest.mark.parametrize(
    ("value", "expected"),
    [(2.5, [2.5, 2.5, 2.5]), ([1, 2, 3], [1, 2, 3]), (np.array([[4.0, 5.0, 6.0]]), [4, 5, 6])],
)
def test_a_bound_input_always_has_its_value(value: Binding, expected: list[float]) -> None:
    data = {"x": np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)}
    bundle = cut(build("N"), at=None, loss="mse", bind={"scale": value}, check=True)
    roles = {spec.tensor.name: spec.role for spec in bundle.client.manifest.state}
    assert [name for name, role in roles.items() if role == "parameter"] == ["w"]
    with Client(bundle.client, threads=1) as client:
        found = client.predict(data)["y"]
    full = {**data, "scale": np.array(expected, np.float32)}
    np.testing.assert_allclose(found, evaluate(build("N"), full)["y"], rtol=1e-5, atol=1e-6)
    assert bundle.manifest.recipe.bound["scale"] in ([2.5], expected)


def test_a_bound_input_in_the_place_of_a_weight_is_not_trained() -> None:
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w", 4, 3), out="hidden")
    model = net.finish(
        {"x": (FLOAT, ["N", 4]), "v": (FLOAT, [3, 2])},
        net.op("MatMul", hidden, "v", out="y"),
        2,
    )
    bundle = cut(model, at=None, loss="mse", bind={"v": [1, 2, 3, 4, 5, 6]}, check=True)
    roles = {spec.tensor.name: spec.role for spec in bundle.client.manifest.state}
    assert roles.get("v", "frozen") == "frozen"
    assert roles["w"] == "parameter"


def test_a_default_is_replaced_by_what_is_bound() -> None:
    model = build("N")
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "scale"))
    data = {"x": np.ones((2, 4), np.float32)}
    adjust(model, Adjustments(bindings={"scale": 3}))
    full = {**data, "scale": np.full(3, 3, np.float32)}
    np.testing.assert_allclose(evaluate(model, data)["y"], evaluate(build("N"), full)["y"])


def test_integers_and_booleans_keep_their_type() -> None:
    for kind, value in ((TensorProto.INT64, 3), (TensorProto.BOOL, True)):
        model = build("N")
        model.graph.input.append(helper.make_tensor_value_info("setting", kind, []))
        adjust(model, Adjustments(bindings={"setting": value}))
        tensor = model.graph.node[0].attribute[0].t
        assert (tensor.data_type, list(tensor.dims)) == (kind, [])
        assert numpy_helper.to_array(tensor) == value


def test_the_callers_model_stays_as_it_is(tmp_path: Path) -> None:
    model = build("N")
    given = model.SerializeToString(deterministic=True)
    adjustments = Adjustments(dims={"N": 2}, bindings={"scale": 1})
    for source in (model, given):
        open_model(source, adjustments)
        changed = read_original(source, adjustments)
        assert [value.name for value in changed.graph.input] == ["x"]
    assert model.SerializeToString(deterministic=True) == given
    onnx.save(model, tmp_path / "model.onnx")
    assert read_dims(read_original(tmp_path / "model.onnx", adjustments).graph.input[0]) == [2, 4]


@pytest.mark.parametrize(
    ("adjustments", "told"),
    [
        (Adjustments(dims={"M": 2}), "they have the symbols 'N', 'T', and other sizes are named"),
        (Adjustments(dims={"x:3": 2}), "the model's inputs have no such size"),
        (Adjustments(dims={"N": 0}), "a size is at least 1"),
        (Adjustments(dims={"N": "3 4"}), "neither a size nor a symbol"),
        (Adjustments(bindings={"y": 1}), "no such input; it has 'x', 'scale'"),
        (Adjustments(bindings={"x": 1}), "the size 'N', 'T' of this input is not fixed; fix it"),
        (Adjustments(bindings={"scale": cast(float, "2.7")}), "scale: '2.7' is not a number"),
        (Adjustments(bindings={"scale": [1, 2]}), r"2 numbers came for an input of shape \[3\]"),
    ],
)
def test_what_does_not_fit_the_inputs_is_refused(adjustments: Adjustments, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        open_model(build("N", "T"), adjustments)


def build_counted(kind: int, *, is_cast: bool = False) -> onnx.ModelProto:
    """A Loop over one layer that reads its number of iterations, or its condition, as an input."""
    net, flag = Net(), kind == TensorProto.BOOL
    net.weight("w", 3, 3)
    nodes = [
        helper.make_node("Identity", ["go"], ["going"]),
        helper.make_node("MatMul", ["s", "w"], ["m"]),
        helper.make_node("Tanh", ["m"], ["next"]),
    ]
    told = helper.make_tensor_value_info
    body = helper.make_graph(
        nodes,
        "body",
        [told("i", TensorProto.INT64, []), told("go", TensorProto.BOOL, []),
         told("s", FLOAT, ["N", 3])],
        [told("going", TensorProto.BOOL, []), told("next", FLOAT, ["N", 3])],
    )  # fmt: skip
    count, yes = net.constant("three", np.array(3)), net.constant("yes", np.array(True))
    given = (
        "setting" if not is_cast else net.op("Cast", "setting", out="cast", to=TensorProto.INT64)
    )
    reads = (count, given) if flag else (given, yes)
    net.op("MatMul", "x", net.weight("first", 4, 3), out="h")
    net.op("Loop", *reads, "h", out="y", body=body)
    return net.finish({"x": (FLOAT, ["N", 4]), "setting": (kind, [])}, "y", 3)


@pytest.mark.parametrize(
    ("kind", "value", "is_cast"),
    [
        (TensorProto.INT64, 0, False),
        (TensorProto.INT64, -1, False),
        (TensorProto.INT32, 0, True),
        (TensorProto.BOOL, False, False),
    ],
)
def test_a_value_with_which_a_loop_does_nothing_is_refused(
    kind: int, value: int | bool, is_cast: bool
) -> None:
    model = build_counted(kind, is_cast=is_cast)
    with pytest.raises(UsageError, match=r"--bind setting=.* 'y_node' \(Loop\) would make no iter"):
        open_model(model, Adjustments(bindings={"setting": value}))
    bundle = cut(model, at=None, loss="mse", bind={"setting": 1})
    assert bundle.client.weights.keys() == {"w", "first"}


def test_a_number_that_the_type_cannot_hold_is_refused() -> None:
    model = build("N")
    model.graph.input.append(helper.make_tensor_value_info("rate", TensorProto.INT64, [1]))
    for value in (0.5, float("nan")):
        with pytest.raises(UsageError, match="is not int64, the type of this input"):
            open_model(model, Adjustments(bindings={"rate": value}))


def test_what_is_not_a_number_or_too_large_a_one_is_refused_but_infinity_is_a_setting() -> None:
    for value in (float("nan"), [1, 2, float("nan")], 1e39):
        with pytest.raises(UsageError, match=r"--bind scale: .* is not a number that float32"):
            open_model(build("N"), Adjustments(bindings={"scale": value}))
    open_model(build("N"), Adjustments(bindings={"scale": float("-inf")}))


def test_a_size_that_contradicts_the_model_is_refused() -> None:
    with pytest.raises(SplitonnxError):
        cut(build("N"), at=None, loss="mse", bind={"scale": 1}, dims={"x:1": 5})
