"""Names and declared types: each given once, used after it was given, and readable."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from onnx import ModelProto

from splitonnx.errors import ModelError, NotAModel
from tests.partitioner.gate.broken_models import Breakage, hold_refusal


def swap_nodes(model: ModelProto) -> None:
    first, second = model.graph.node[0], model.graph.node[1]
    kept = ModelProto.FromString(model.SerializeToString()).graph.node[0]
    first.CopyFrom(second)
    second.CopyFrom(kept)


def close_circle(model: ModelProto) -> None:
    model.graph.node[0].input[0] = "act2"


def double_value(model: ModelProto) -> None:
    model.graph.node[1].output[0] = model.graph.node[0].output[0]


def double_weight(model: ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def drop_weight(model: ModelProto) -> None:
    del model.graph.initializer[0]


def drop_output(model: ModelProto) -> None:
    model.graph.output[0].name = "nowhere"


BROKEN: list[Breakage] = [
    (swap_nodes, NotAModel, "reads 'linear0'"),
    (close_circle, NotAModel, "reads 'act2'"),
    (double_value, NotAModel, "two values bear the name"),
    (double_weight, NotAModel, "two values bear the name 'w0'"),
    (drop_weight, NotAModel, "reads 'w0'"),
    (drop_output, NotAModel, "nothing makes its output 'nowhere'"),
]


@pytest.mark.parametrize(
    ("break_it", "kind", "reason"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_model_is_refused_in_one_line(
    break_it: Callable[[ModelProto], None], kind: type[ModelError], reason: str
) -> None:
    hold_refusal(break_it, kind, reason)
