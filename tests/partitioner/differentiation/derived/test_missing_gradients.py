"""The operators that are refused before the gradient builder is called."""

from __future__ import annotations

import onnx

from splitonnx.partitioner.differentiation.control_flow.obstacles import CONTROL_FLOW
from splitonnx.partitioner.differentiation.derived.missing_gradients import WITHOUT_GRADIENT


def test_each_is_an_operator_of_onnx() -> None:
    assert {kind for kind in WITHOUT_GRADIENT if not onnx.defs.has(kind)} == set()


def test_control_flow_is_among_them_because_the_builder_aborts_on_it() -> None:
    assert set(CONTROL_FLOW) <= WITHOUT_GRADIENT
