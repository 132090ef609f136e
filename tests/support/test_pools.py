"""The judge's quick pooling against the slow one that it replaces."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops import _op_common_pool, op_pool_common

from tests.support import pools

_SHAPES: dict[int, tuple[tuple[int, ...], dict[str, Any]]] = {
    1: ((2, 3, 9), {"kernel_shape": [3], "strides": [2], "pads": [1, 0]}),
    2: ((1, 2, 6, 5), {"kernel_shape": [2, 3], "strides": [1, 2], "pads": [1, 0, 0, 2]}),
    3: ((1, 1, 5, 4, 4), {"kernel_shape": [2, 2, 3], "strides": [2, 1, 1], "pads": [0] * 6}),
}
_KINDS: dict[str, list[dict[str, Any]]] = {
    "AveragePool": [{"count_include_pad": 0}, {"count_include_pad": 1}],
    "LpPool": [{"p": 1}, {"p": 3}],
}
_MODES: list[dict[str, Any]] = [
    {},
    {"ceil_mode": 1},
    {"dilations": 2},
    {"auto_pad": "SAME_UPPER"},
    {"auto_pad": "VALID"},
]


@pytest.mark.parametrize("rank", _SHAPES)
@pytest.mark.parametrize("mode", _MODES, ids=str)
@pytest.mark.parametrize("kind", _KINDS)
def test_windows_pooled_at_once_are_those_pooled_one_by_one(
    kind: str, mode: dict[str, Any], rank: int
) -> None:
    shape, attributes = _SHAPES[rank]
    for own in _KINDS[kind]:
        chosen = {**attributes, **own, **mode}
        if "dilations" in mode:
            chosen["dilations"] = [mode["dilations"]] * rank
        if "auto_pad" in mode:
            del chosen["pads"]
        _expect_the_same(kind, chosen, shape)


@pytest.mark.parametrize("ceil_mode", [0, 1])
@pytest.mark.parametrize(
    "attributes",
    [{"pads": [1, 0, 0, 2]}, {"pads": [0] * 4}, {"auto_pad": "SAME_UPPER"}],
    ids=str,
)
def test_maxima_found_at_once_are_those_found_one_by_one(
    attributes: dict[str, Any], ceil_mode: int
) -> None:
    chosen = {**attributes, "kernel_shape": [2, 3], "ceil_mode": ceil_mode}
    _expect_the_same("MaxPool", chosen, (1, 2, 6, 5))


def _expect_the_same(kind: str, attributes: dict[str, Any], shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(len(shape)).standard_normal(shape)
    slow, quick = (
        _evaluate(kind, attributes, x, pool, find_maxima)
        for pool, find_maxima in (
            (pools.pool_one_by_one, pools.find_maxima_one_by_one),
            (pools.pool_at_once, pools.find_maxima_at_once),
        )
    )
    assert quick.shape == slow.shape
    np.testing.assert_allclose(quick, slow, rtol=1e-14, atol=0)


def _evaluate(
    kind: str, attributes: dict[str, Any], x: np.ndarray, pool: object, find_maxima: object
) -> np.ndarray:
    node = helper.make_node(kind, ["x"], ["y"], **attributes)
    values = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, None) for n in "xy"]
    graph = helper.make_graph([node], "pool", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
    with (
        patch.object(op_pool_common, "pool", pool),
        patch.object(_op_common_pool, "_pool", find_maxima),
    ):
        results = ReferenceEvaluator(model).run(None, {"x": x})
    assert isinstance(results, list)
    return np.asarray(results[0])
