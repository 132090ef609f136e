"""A stop needs a gradient; tests/cases/test_lost_detaches.py trains beside one."""

from __future__ import annotations

import pytest

from splitonnx.errors import UnknownTensor, UsageError
from splitonnx.partitioner.cutting.passes.gradient_stops import stop_gradients
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.graphs.builders import DETACHED
from splitonnx.partitioner.partitions import cut
from tests.support.small_models import load_model

NAME = "41_lost_detach"


def test_every_reader_gets_the_detached_copy() -> None:
    prepared = open_model(load_model(NAME))
    weights = list(prepared.graph.initializers)
    stop_gradients(prepared.graph, weights, ["z"])
    (copied,) = [node for node in prepared.graph if DETACHED in node.metadata_props]
    assert [value.name if value else "" for value in copied.inputs] == ["z"]
    readers = [node.op_type for node, _ in copied.outputs[0].uses()]
    assert sorted(readers) == ["Add", "Round", "Sub"]


def test_a_parameter_is_frozen_instead() -> None:
    with pytest.raises(UsageError, match="'w1' is a parameter; --freeze"):
        cut(load_model(NAME), at=None, stop_gradients="w1")


def test_a_stop_without_an_effect_is_refused() -> None:
    with pytest.raises(UsageError, match="'x' has no effect"):
        cut(load_model(NAME), at=None, stop_gradients="x")


def test_an_unknown_tensor_is_named() -> None:
    with pytest.raises(UnknownTensor, match="'nowhere'"):
        cut(load_model(NAME), at=None, stop_gradients="nowhere")


def test_a_stop_behind_the_last_node_is_refused() -> None:
    model = load_model(NAME)
    (output,) = model.graph.output
    with pytest.raises(UsageError, match=f"--stop-gradient '{output.name}' has no effect: no node"):
        cut(model, at=None, loss="mse", stop_gradients=output.name)
