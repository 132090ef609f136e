"""Operators that onnx's reference evaluator gets wrong are corrected for the comparison."""

from __future__ import annotations

import math
from types import FunctionType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.partitioner.native import corrections, natives

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.standard_normal((2, 4, 3, 5))


def evaluate(kind: str, opset: int, *arrays: np.ndarray, **attributes: Any) -> np.ndarray:
    """Evaluate one node as the comparison does, whose evaluator alone must be wrong."""
    names = [f"x{index}" for index in range(len(arrays))]
    node = helper.make_node(kind, names, ["y"], **attributes)
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.DOUBLE, array.shape)
        for name, array in zip(names, arrays, strict=True)
    ]
    output = onnx.ValueInfoProto(name="y")
    graph = helper.make_graph([node], "one", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    given = dict(zip(names, arrays, strict=True))
    batch = {
        name: numpy_helper.from_array(array).SerializeToString() for name, array in given.items()
    }
    (outputs,) = natives.run_reference(model.SerializeToString(), [batch], 10.0)
    found = numpy_helper.to_array(TensorProto.FromString(outputs["y"]))
    try:
        (uncorrected,) = ReferenceEvaluator(model).run(None, given)
    except ValueError:  # it mixes up shapes, too
        return found
    assert not np.allclose(uncorrected, found)
    return found


@pytest.mark.parametrize("opset", [9, 13])
def test_batch_normalization_uses_running_statistics_in_inference(opset: int) -> None:
    scale, bias, mean = RANDOM.standard_normal((3, 4))
    var = RANDOM.uniform(0.5, 2, 4)
    found = evaluate("BatchNormalization", opset, IMAGES, scale, bias, mean, var)
    for at, value in np.ndenumerate(IMAGES):
        c = at[1]
        expected = (value - mean[c]) / math.sqrt(var[c] + 1e-5) * scale[c] + bias[c]
        assert found[at] == pytest.approx(expected)


def test_lrn_sums_over_all_channels_near_by() -> None:
    found = evaluate("LRN", 18, IMAGES, size=3, alpha=0.6, beta=0.5, bias=2.0)
    for (n, c, h, w), value in np.ndenumerate(IMAGES):
        total = sum(IMAGES[n, other, h, w] ** 2 for other in range(max(0, c - 1), min(4, c + 2)))
        assert found[n, c, h, w] == pytest.approx(value / math.sqrt(2 + 0.6 / 3 * total))


@pytest.mark.parametrize("opset", [10, 13, 18, 19, 21])
def test_integers_are_dequantized_in_every_opset(opset: int) -> None:
    """onnx's own evaluator does so from opset 19 on only."""
    integers = RANDOM.integers(-128, 128, (2, 3, 4)).astype(np.int8)
    scale, zero = np.array([0.5, 0.25, 2], np.float32), np.array([1, -2, 3], np.int8)
    if opset == 10:  # without axes
        scale, zero = scale[0], zero[0]
    constants = [(scale, "scale"), (zero, "zero")]
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["y"])],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.INT8, integers.shape)],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(np.asarray(array), name) for array, name in constants],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    batch = {"x": numpy_helper.from_array(integers).SerializeToString()}
    (outputs,) = natives.run_reference(model.SerializeToString(), [batch], 10.0)
    found = numpy_helper.to_array(TensorProto.FromString(outputs["y"]))
    shape = (3, 1) if scale.ndim else ()
    expected = (integers.astype(np.float32) - zero.reshape(shape)) * scale.reshape(shape)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_a_loop_stacks_its_iterations_and_needs_no_condition(most: int) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 18]>
        loops (double[2, 3] s, int64 most, double[3] p) => (double[2, 3] last, double[K, 2, 3] rows)
        {
            last, rows = Loop <
                body = step (int64 i, bool going, double[2, 3] a) =>
                    (bool again, double[2, 3] n, double[2, 3] y) {
                        again = Identity (going)  n = Mul (a, p)  y = Neg (n)
                    }
            > (most, , s)
        }
    """)
    given = {"s": IMAGES[:, 0, 0, :3], "most": np.array(most), "p": np.array([2.0, 1.0, -1.0])}
    batch = {n: numpy_helper.from_array(a).SerializeToString() for n, a in given.items()}
    (found,) = natives.run_reference(model.SerializeToString(), [batch], 10.0)
    last, rows = (numpy_helper.to_array(TensorProto.FromString(found[n])) for n in ("last", "rows"))
    steps = [given["s"] * given["p"] ** (step + 1) for step in range(most)]
    np.testing.assert_allclose(last, steps[-1] if steps else given["s"])
    np.testing.assert_allclose(rows, -np.array(steps).reshape(most, 2, 3))


def test_lp_normalization_divides_by_the_sum_of_absolute_values() -> None:
    found = evaluate("LpNormalization", 18, IMAGES, p=1, axis=1)
    np.testing.assert_allclose(np.abs(found).sum(1), 1)
    assert (np.sign(found) == np.sign(IMAGES)).all()


def test_conv_transpose_keeps_groups_apart() -> None:
    weight, bias = RANDOM.standard_normal((4, 2, 2, 2)), RANDOM.standard_normal(4)
    found = evaluate("ConvTranspose", 18, IMAGES, weight, bias, group=2)
    expected = np.zeros((2, 4, 4, 6)) + bias[:, None, None]
    for (n, c, h, w), value in np.ndenumerate(IMAGES):
        first = c // 2 * 2
        expected[n, first : first + 2, h : h + 2, w : w + 2] += value * weight[c]
    np.testing.assert_allclose(found, expected)


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax", "Hardmax"])
def test_softmax_of_an_old_opset_works_over_all_axes_from_one_on(kind: str) -> None:
    found = evaluate(kind, 11, IMAGES, axis=2)
    for at in np.ndindex(2, 4):
        row = IMAGES[at]
        shares = np.exp(row) / np.exp(row).sum()
        if kind == "LogSoftmax":
            shares = np.log(shares)
        if kind == "Hardmax":
            shares = (row == row.max()).astype(float)
        np.testing.assert_allclose(found[at], shares)


def test_softmax_of_a_new_opset_works_over_one_axis() -> None:
    graph = helper.make_graph(
        [helper.make_node("Softmax", ["x"], ["y"], axis=1)],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, IMAGES.shape)],
        [onnx.ValueInfoProto(name="y")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    batch = {"x": numpy_helper.from_array(IMAGES).SerializeToString()}
    (outputs,) = natives.run_reference(model.SerializeToString(), [batch], 10.0)
    found = numpy_helper.to_array(TensorProto.FromString(outputs["y"]))
    np.testing.assert_allclose(found, np.exp(IMAGES) / np.exp(IMAGES).sum(1, keepdims=True))


def test_what_the_evaluator_breaks_on_is_no_mistake_of_ours() -> None:
    graph = helper.make_graph(
        [helper.make_node("OneHot", ["x", "depth", "values"], ["y"])],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.INT64, [2])],
        [onnx.ValueInfoProto(name="y")],
        [
            numpy_helper.from_array(np.array([3]), "depth"),
            numpy_helper.from_array(np.array([0, 1], np.float32), "values"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    batch = {"x": numpy_helper.from_array(np.array([0, 2])).SerializeToString()}
    with pytest.raises(RuntimeError, match="TypeError"):
        natives.run_reference(model.SerializeToString(), [batch], 10.0)


@pytest.mark.parametrize("kind", [AttributeError, IndexError, KeyError, TypeError, ValueError])
def test_an_operator_of_ours_that_fails_is_told_from_the_evaluator(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("planted")

    own = FunctionType(fail.__code__, vars(corrections), closure=fail.__closure__)
    monkeypatch.setattr(corrections.Softmax, "_run", own)
    graph = helper.make_graph(
        [helper.make_node("Softmax", ["x"], ["y"])],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, IMAGES.shape)],
        [onnx.ValueInfoProto(name="y")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    batch = {"x": numpy_helper.from_array(IMAGES).SerializeToString()}
    with pytest.raises(natives.CorrectionFailed, match=f"{kind.__name__}.*planted.*corrections"):
        natives.run_reference(model.SerializeToString(), [batch], 10.0)
