"""Normalizations within a model, with extents that only the data know."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from tests.support.differentiations import hold_gradients

RANDOM = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RANDOM.normal(0.2, 1.0, shape).astype(np.float32)


@pytest.mark.parametrize("dynamic", [{}, {"x": 0}, {"x": 2}])
@pytest.mark.parametrize("shape", [(2, 3, 6), (2, 3, 4, 5), (2, 3, 2, 3, 2)])
def test_instance_normalization(dynamic: dict[str, int], shape: tuple[int, ...]) -> None:
    node = helper.make_node("InstanceNormalization", ["x", "s", "b"], ["y"], epsilon=1e-2)
    hold_gradients([node], {"x": draw(*shape), "s": draw(3), "b": draw(3)}, ["y"], dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [{}, {"x": 0}, {"x": 3}])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_normalization(dynamic: dict[str, int], groups: int) -> None:
    inputs = ["x", "s", "b"]
    node = helper.make_node("GroupNormalization", inputs, ["y"], num_groups=groups, epsilon=1e-2)
    arrays = {"x": draw(2, 4, 3, 5), "s": draw(4), "b": draw(4)}
    hold_gradients([node], arrays, ["y"], opset=21, dynamic=dynamic)


@pytest.mark.parametrize("axes", [[0, 2, 3], [2, 3], [1]])
@pytest.mark.parametrize("dynamic", [{}, {"x": 0}])
def test_mean_variance_normalization(axes: list[int], dynamic: dict[str, int]) -> None:
    node = helper.make_node("MeanVarianceNormalization", ["x"], ["y"], axes=axes)
    hold_gradients([node], {"x": draw(3, 4, 4, 5)}, ["y"], dynamic=dynamic)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_lp_normalization(p: int, axis: int) -> None:
    node = helper.make_node("LpNormalization", ["x"], ["y"], axis=axis, p=p)
    hold_gradients([node], {"x": draw(3, 4, 5)}, ["y"], dynamic={"x": 1})


def test_a_vector_of_zeros_stays_zero_and_has_a_gradient() -> None:
    x = draw(3, 4)
    x[1] = 0
    node = helper.make_node("LpNormalization", ["x"], ["y"])
    scaled = helper.make_node("Mul", ["x", "s"], ["z"])
    node.input[0] = "z"
    hold_gradients([scaled, node], {"x": x, "s": draw(4)}, ["y"], constants=["x"])


@pytest.mark.parametrize("axis", [-1, 1, 2, -4])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("outputs", [["y"], ["y", "mean", "inverse"]])
def test_layer_normalization(axis: int, biased: bool, outputs: list[str]) -> None:
    shape = (2, 3, 4, 5)
    inputs = ["x", "s", "b"] if biased else ["x", "s"]
    arrays = {"x": draw(*shape), "s": draw(*shape[axis:]), "b": draw(*shape[axis:])}
    node = helper.make_node("LayerNormalization", inputs, outputs, axis=axis, epsilon=1e-2)
    known = {} if axis == -4 else {"x": 0}
    hold_gradients([node], {name: arrays[name] for name in inputs}, outputs, dynamic=known)


def test_layer_normalization_with_a_scale_that_is_spread() -> None:
    node = helper.make_node("LayerNormalization", ["x", "s", "b"], ["y"], axis=1)
    arrays = {"x": draw(2, 3, 4), "s": draw(4), "b": draw(1, 4)}
    hold_gradients([node], arrays, ["y"], dynamic={"x": 0})
