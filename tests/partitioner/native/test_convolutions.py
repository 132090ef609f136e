"""Convolutions for the reference evaluator, against loops and against onnx's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from splitonnx.partitioner.native.convolutions import Conv

RANDOM = np.random.default_rng(0)
CASES: tuple[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], ...] = (
    ((2, 3, 5, 6), (4, 3, 3, 3), {}),
    ((2, 3, 5, 6), (4, 3, 1, 1), {"strides": [2, 3]}),
    ((2, 3, 7, 6), (4, 3, 3, 2), {"pads": [1, 0, 2, 3], "strides": [2, 1]}),
    ((2, 4, 9, 8), (6, 2, 3, 3), {"group": 2, "dilations": [2, 3], "pads": [2, 1, 2, 1]}),
    ((1, 4, 6, 6), (8, 1, 3, 3), {"group": 4, "kernel_shape": [3, 3]}),
    ((2, 2, 7, 8), (3, 2, 3, 4), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    ((2, 2, 7, 8), (3, 2, 4, 2), {"auto_pad": "SAME_LOWER", "dilations": [2, 3]}),
    ((2, 2, 7, 8), (3, 2, 3, 4), {"auto_pad": "VALID"}),
    ((2, 3, 9), (4, 3, 4), {"strides": [2], "pads": [1, 2]}),
    ((1, 2, 4, 5, 6), (3, 2, 2, 3, 2), {"strides": [1, 2, 2], "pads": [0, 1, 1, 1, 0, 1]}),
)


def build(attributes: dict[str, Any], has_bias: bool) -> onnx.ModelProto:
    names = ["x", "w", "b"][: 2 + has_bias]
    graph = helper.make_graph(
        [helper.make_node("Conv", names, ["y"], **attributes)], "one",
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in names],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def evaluate(
    shape: tuple[int, ...], kernel: tuple[int, ...], attributes: dict[str, Any], *, has_bias: bool
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Return what our class and onnx's own compute, and the inputs."""
    given = {"x": RANDOM.standard_normal(shape), "w": RANDOM.standard_normal(kernel)}
    if has_bias:
        given["b"] = RANDOM.standard_normal(kernel[:1])
    model = build(attributes, has_bias)
    return run(model, given, [Conv]), run(model, given, []), given


def run(
    model: onnx.ModelProto, given: dict[str, np.ndarray], classes: list[type[OpRun]]
) -> np.ndarray:
    outputs: Any = ReferenceEvaluator(model, new_ops=classes).run(None, given)
    made: np.ndarray = outputs[0]
    return made


@pytest.mark.parametrize(("shape", "kernel", "attributes"), CASES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_convolution_is_that_of_onnxs_own_class(
    shape: tuple[int, ...], kernel: tuple[int, ...], attributes: dict[str, Any], has_bias: bool
) -> None:
    ours, own, _ = evaluate(shape, kernel, attributes, has_bias=has_bias)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, own, rtol=1e-12, atol=1e-12)


def test_a_convolution_is_the_sum_of_its_formula() -> None:
    attributes = {"group": 2, "dilations": [2, 1], "pads": [2, 0, 1, 1], "strides": [2, 1]}
    found, _, given = evaluate((1, 4, 6, 5), (4, 2, 3, 2), attributes, has_bias=True)
    x = np.pad(given["x"], ((0, 0), (0, 0), (2, 1), (0, 1)))
    for (n, m, row, column), value in np.ndenumerate(found):
        expected = given["b"][m]
        for (c, i, j), weight in np.ndenumerate(given["w"][m]):
            expected += weight * x[n, c + m // 2 * 2, 2 * row + 2 * i, column + j]
        assert value == pytest.approx(expected)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_the_result_has_the_type_of_the_image(kind: type[np.floating]) -> None:
    given = {"x": np.ones((1, 2, 3, 3), kind), "w": np.ones((1, 2, 2, 2), kind)}
    made = run(build({}, False), given, [Conv])
    assert made.dtype == kind
    np.testing.assert_array_equal(made, np.full((1, 1, 2, 2), 8))


@pytest.mark.parametrize(
    ("shape", "kernel", "attributes"),
    [
        ((1, 3, 4, 4), (2, 2, 3, 3), {}),
        ((1, 4, 4, 4), (3, 2, 3, 3), {"group": 2}),
        ((1, 3, 4, 4), (2, 3, 3), {}),
        ((1, 3, 4, 4), (2, 3, 3, 3), {"kernel_shape": [3, 2]}),
        ((1, 3, 4, 4), (2, 3, 5, 3), {}),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    shape: tuple[int, ...], kernel: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    model = build(attributes, False)
    with pytest.raises(ValueError):  # noqa: PT011
        run(model, {"x": np.zeros(shape), "w": np.zeros(kernel)}, [Conv])
