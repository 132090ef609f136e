"""What random graphs brought to light, each as a small model of its own."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from splitonnx.errors import DifferentResult, UsageError
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from tests.support.derivatives import assert_differentiable
from tests.support.nets import FLOAT, Net
from tests.support.small_models import evaluate, hold_predictions

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4) / 7


def build_net() -> Net:
    """Build x times a weight."""
    net = Net()
    net.op("MatMul", "x", net.weight("w", 4, 2), out="y")
    return net


def finish(net: Net, output: str, dims: list[int | str], *more: str) -> onnx.ModelProto:
    """Close a net with a second output; ``more`` are inputs beside x, each of three columns."""
    shapes: dict[str, list[int | str]] = {"x": ["N", 4], **{name: ["N", 3] for name in more}}
    model = net.finish({name: (FLOAT, dims) for name, dims in shapes.items()}, "y", 2)
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, FLOAT, dims))
    return model


def test_an_input_that_is_nothing_but_an_output_is_predicted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = finish(build_net(), "z", ["N", 3], "z")
    bundle = cut(model, at=None, loss="mse", check=True)
    hold_predictions(bundle, model, {"x": ROWS, "z": ROWS[:, 1:] + 1})
    assert not caplog.records


def test_an_output_that_is_one_number_has_an_entry_for_each_batch() -> None:
    net = build_net()
    net.op("ReduceMean", "y", out="mean", keepdims=0)
    model = finish(net, "mean", [])
    with Client(cut(model, at=None, loss="mse").client, threads=1) as client:
        found = client.predict({"x": ROWS}, batch_size=2)["mean"]
    expected = [evaluate(model, {"x": part})["mean"] for part in (ROWS[:2], ROWS[2:])]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_an_output_that_the_parts_do_not_predict_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = finish(build_net(), "w", [4, 2])
    cut(model, at=None, loss="mse", check=True)
    assert [record.getMessage() for record in caplog.records] == [
        "what the parts predict leaves out 'w', an output of the model"
    ]


def test_a_difference_is_found_beside_an_output_that_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = Net()
    net.op("Tanh", net.op("MatMul", "x", net.weight("w", 4, 2), out="product"), out="y")
    model = finish(net, "w", [4, 2])

    def prepare_wrongly(*arguments: ir.Model, **options: object) -> PreparedModel:
        prepared = prepare(*arguments, **options)  # type: ignore[arg-type]
        for node in list(prepared.inference.graph):
            if node.op_type == "Tanh":
                node.op_type = "Sigmoid"
        return prepared

    monkeypatch.setattr("splitonnx.partitioner.partitions.prepare", prepare_wrongly)
    with pytest.raises(DifferentResult):
        cut(model, at=None, loss="mse", check=True)


@pytest.mark.parametrize("opset", [9, 13, 15])
def test_a_normalization_of_any_opset_is_compared_without_a_remark(
    opset: int, caplog: pytest.LogCaptureFixture
) -> None:
    net = Net(opset)
    net.op("Reshape", "x", net.constant("dims", np.array([-1, 2, 2])), out="halves")
    net.batchnorm("halves", 2, out="y", training=False)
    model = net.finish({"x": (FLOAT, ["N", 4])}, "y", 2, 2)
    bundle = cut(model, at=None, loss="mse", check=True)
    assert not caplog.records
    halves = ROWS.reshape(3, 2, 2)
    weights = {t.name: onnx.numpy_helper.to_array(t)[:, None] for t in model.graph.initializer[1:]}
    scale, bias, mean, var = weights.values()
    with Client(bundle.client, threads=1) as client:
        found = client.predict({"x": ROWS})["y"]
    np.testing.assert_allclose(
        found, (halves - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-5
    )


def test_a_transpose_of_data_without_an_order_of_axes_is_trained_after() -> None:
    net = Net()
    net.op("Mul", net.op("Transpose", "x", out="turned"), net.weight("w", 4, 1), out="y")
    assert_differentiable(net, {"x": ROWS})


def test_an_output_that_does_not_depend_on_data_is_no_output_to_learn_from() -> None:
    model = finish(build_net(), "w", [4, 2])
    with pytest.raises(UsageError, match=r"'w' does not depend on the model's inputs.* of y$"):
        cut(model, at=None, loss="mse", output="w")


def test_elements_that_are_all_equal_are_normalized_to_zero() -> None:
    net = build_net()
    net.op("MeanVarianceNormalization", "x", out="even", axes=[0])
    model = finish(net, "even", ["N", 4])
    equal = np.full((3, 4), 0.3, np.float32)
    with Client(cut(model, at=None, loss="mse").client, threads=1) as client:
        found = client.predict({"x": equal})["even"]
    np.testing.assert_allclose(found, np.zeros((3, 4)), atol=1e-6)
