"""What onnx's own checker refuses is refused in one line, whatever the size of the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from onnx import ModelProto, TensorProto

from splitonnx.errors import ModelError, NotAModel
from tests.partitioner.gate.broken_models import Breakage, hold_refusal


def wrong_type(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.INT32


BROKEN: list[Breakage] = [
    (wrong_type, NotAModel, "linear0"),
]


@pytest.mark.parametrize(
    ("break_it", "kind", "reason"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_model_is_refused_in_one_line(
    break_it: Callable[[ModelProto], None], kind: type[ModelError], reason: str
) -> None:
    hold_refusal(break_it, kind, reason)
