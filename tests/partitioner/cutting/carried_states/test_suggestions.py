"""Tests of which outputs and inputs look like one state, after a step and before it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from splitonnx.partitioner.cutting.carried_states.suggestions import (
    describe_overlooked_states,
    find_likely_states,
)
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut
from tests.support.carried import (
    AVERAGES,
    Shapes,
    build_averages,
    build_lstm,
    build_recurrent,
    close,
)
from tests.support.nets import FLOAT, Net


def find_pairs(*pairs: tuple[str, str], size: int | str = 3) -> list[tuple[str, str]]:
    """Find the states of a layer with an output and an input for each pair, all of one shape."""
    net = Net()
    net.op("MatMul", "x", net.weight("w", 3, 2), out="y")
    for made, source in pairs:
        net.op("Add", "x", source, out=made)
    inputs: dict[str, tuple[int, Sequence[int | str]]] = {"x": (FLOAT, ["N", 3])}
    outputs: dict[str, tuple[int, Sequence[int | str]]] = {"y": (FLOAT, ["N", 2])}
    for made, source in pairs:
        inputs[source], outputs[made] = (FLOAT, ["N", size]), (FLOAT, ["N", 3])
    model = close(net, inputs, outputs)
    return find_likely_states(prepare(open_model(model)), "y")


@pytest.mark.parametrize(
    ("made", "source"),
    [
        ("h_n", "h_0"),
        ("hn", "h0"),
        ("h1", "h0"),
        ("stateN", "state"),
        ("state_out", "state_in"),
        ("encoder.cell_out", "encoder.cell_in"),
        ("new_memory", "memory"),
        ("next_state", "prev_state"),
        ("hidden_next", "hidden"),
        ("present.0.key", "past.0.key"),
    ],
)
def test_names_that_clearly_follow_each_other_are_a_state(made: str, source: str) -> None:
    assert find_pairs((made, source)) == [(made, source)]


@pytest.mark.parametrize(
    ("made", "source"), [("scores", "image"), ("output1", "input1"), ("b", "a"), ("logits", "mask")]
)
def test_other_names_are_no_state(made: str, source: str) -> None:
    assert find_pairs((made, source)) == []


def test_several_states_are_found_and_doubtful_ones_left_out() -> None:
    pairs = [("h_n", "h_0"), ("c_n", "c_0")]
    assert find_pairs(*pairs) == pairs
    assert find_pairs(("h_n", "h_0"), ("h1", "h_in")) == []


def test_shapes_and_the_loss_decide_as_well() -> None:
    assert find_pairs(("h_n", "h_0"), size=1) == []
    assert find_pairs(("h_n", "h_0"), size="T") == [("h_n", "h_0")]
    prepared = prepare(open_model(build_recurrent()))
    assert find_likely_states(prepared, "y") == [("h_out", "h_in")]
    assert find_likely_states(prepared, "h_out") == []
    lstm = prepare(open_model(build_lstm()))
    assert find_likely_states(lstm, "y") == [("hn", "h0"), ("cn", "c0")]


def test_a_cache_that_grows_with_each_step_is_no_state() -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 3, 2), out="y")
    net.op("Concat", "past.key", "x", out="present.key", axis=0)
    shapes: Shapes = {"x": (FLOAT, ["N", 3]), "past.key": (FLOAT, ["P", 3])}
    outputs: Shapes = {"y": (FLOAT, ["N", 2]), "present.key": (FLOAT, ["P + N", 3])}
    model = close(net, shapes, outputs)
    assert find_likely_states(prepare(open_model(model)), "y") == []


def test_states_that_the_user_named_are_not_suggested() -> None:
    assert find_likely_states(prepare(open_model(build_averages())), "y") == [
        ("mean_out", "mean_in"),
        ("count_out", "count_in"),
    ]
    named = prepare(open_model(build_averages()), states=list(AVERAGES.items()))
    assert find_likely_states(named, "y") == []


def test_states_with_a_value_in_the_file_are_found_as_well() -> None:
    pairs = list(AVERAGES.items())
    model = build_averages(is_stored=True)
    prepared = prepare(open_model(model))
    assert find_likely_states(prepared, "y") == pairs
    mean, count = describe_overlooked_states(prepared, "y")
    assert "'mean_in' looks like a state that output 'mean_out' replaces" in mean
    assert "a constant" in count
    assert "--state count_out=count_in" in count
    assert find_likely_states(prepare(open_model(model), states=pairs), "y") == []
    assert not list(describe_overlooked_states(prepare(open_model(build_averages())), "y"))


def test_cut_warns_of_a_state_that_is_trained_unless_the_user_decided(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, told = build_averages(is_stored=True), "'mean_in' looks like a state"
    trained = cut(model, at=None, loss="mse").client.manifest
    role = next(spec.role for spec in trained.state if spec.tensor.name == "mean_in")
    assert ("is trained as a weight" in caplog.text) == (role == "parameter")
    assert told in caplog.text
    for options in ({"states": AVERAGES}, {"freeze": ["^mean_in$"]}):
        caplog.clear()
        cut(model, at=None, loss="mse", **options)
        assert told not in caplog.text
