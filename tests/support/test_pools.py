"""The judge's quick pooling against the slow one that it stands for."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.ops import op_pool_common

from tests.support.pools import pool_one_by_one

_SHAPES = {
    1: ((2, 3, 9), {"kernel_shape": [3], "strides": [2], "pads": [1, 0]}),
    2: ((1, 2, 6, 5), {"kernel_shape": [2, 3], "strides": [1, 2], "pads": [1, 0, 0, 2]}),
    3: ((1, 1, 5, 4, 4), {"kernel_shape": [2, 2, 3], "strides": [2, 1, 1], "pads": [0] * 6}),
}
_KINDS = {
    "AveragePool": [{"count_include_pad": 0}, {"count_include_pad": 1}],
    "LpPool": [{"p": 1}, {"p": 3}],
    "MaxPool": [{}],
}
_MODES = [{}, {"ceil_mode": 1}, {"dilations": 2}, {"auto_pad": "SAME_UPPER"}, {"auto_pad": "VALID"}]


@pytest.mark.parametrize("rank", _SHAPES)
@pytest.mark.parametrize("mode", _MODES, ids=str)
@pytest.mark.parametrize("kind", _KINDS)
def test_windows_pooled_at_once_are_those_pooled_one_by_one(
    kind: str, mode: dict[str, object], rank: int
) -> None:
    shape, attributes = _SHAPES[rank]
    x = np.random.default_rng(rank).standard_normal(shape)
    for own in _KINDS[kind]:
        chosen = {**attributes, **own, **mode}
        if "dilations" in mode:
            chosen["dilations"] = [2] * rank
        if "auto_pad" in mode:
            del chosen["pads"]
        quick = _evaluate(kind, chosen, x)
        with patch.object(op_pool_common, "pool", pool_one_by_one):
            slow = _evaluate(kind, chosen, x)
        np.testing.assert_allclose(quick, slow, rtol=1e-14, atol=0)
        assert quick.shape == slow.shape


def _evaluate(kind: str, attributes: dict[str, object], x: np.ndarray) -> np.ndarray:
    node = helper.make_node(kind, ["x"], ["y"], **attributes)
    values = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, None) for n in "xy"]
    graph = helper.make_graph([node], "pool", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
    results = ReferenceEvaluator(model).run(None, {"x": x})
    assert isinstance(results, list)
    return np.asarray(results[0])
