"""Models that are broken in one place, held against the gate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from onnx import ModelProto

from splitonnx.errors import ModelError
from splitonnx.partitioner.gate.gates import open_model
from tests.support.zoo import ZOO

Breakage = tuple[Callable[[ModelProto], None], type[ModelError], str]
"""How a model is broken, the error that refuses it, and what that says."""


def make_model() -> ModelProto:
    return ZOO["chain"].build()


def hold_refusal(
    break_it: Callable[[ModelProto], None], kind: type[ModelError], reason: str
) -> None:
    """Break a model and hold the error of the gate: its kind, what it says, and one line."""
    model = make_model()
    break_it(model)
    with pytest.raises(kind) as caught:
        open_model(model.SerializeToString())
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
