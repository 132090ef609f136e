"""Losses within a model, with a batch that only the data know."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from tests.support.differentiations import hold_gradients

RANDOM = np.random.default_rng(0)


def draw(*shape: int) -> np.ndarray:
    return RANDOM.normal(0.2, 1.0, shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ignored", [None, 2])
@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 3, 2)])
def test_losses_within_a_model(
    kind: str, reduction: str, weighted: bool, ignored: int | None, shape: tuple[int, ...]
) -> None:
    labels = np.random.default_rng(1).integers(0, 4, (shape[0], *shape[2:]))
    arrays = {"x": draw(*shape), "labels": labels}
    if weighted:
        arrays["w"] = np.abs(draw(4))
    attributes: dict[str, Any] = {} if ignored is None else {"ignore_index": ignored}
    node = helper.make_node(kind, list(arrays), ["y"], reduction=reduction, **attributes)
    known = {"x": 0, "labels": 0}
    hold_gradients([node], arrays, ["y"], dynamic=known, constants=["w"], entries=2)


def test_log_probabilities_that_a_cross_entropy_hands_out_have_a_gradient() -> None:
    arrays = {"x": draw(6, 4), "labels": np.array([0, 3, 1, 2, 2, 0], np.int32)}
    node = helper.make_node("SoftmaxCrossEntropyLoss", ["x", "labels"], ["y", "log_prob"])
    hold_gradients([node], arrays, ["y", "log_prob"])
