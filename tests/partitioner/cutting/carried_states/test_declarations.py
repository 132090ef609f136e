"""Tests of which inputs can be states that training carries from step to step."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest

from splitonnx.errors import UsageError
from splitonnx.manifests import Role
from splitonnx.partitioner.cutting.carried_states.declarations import list_pairs
from splitonnx.partitioner.cutting.preparations import PreparedModel, choose_output, prepare
from splitonnx.partitioner.gate.adjustments import Adjustments
from splitonnx.partitioner.gate.gates import open_model
from tests.support.carried import BATCH, RECURRENT, Shapes, build_recurrent, close
from tests.support.nets import FLOAT, INT64, Net

Dims = Mapping[str, int | str]


def prepare_states(
    model: onnx.ModelProto, pairs: list[tuple[str, str]], dims: Dims | None = None
) -> PreparedModel:
    adjustments = Adjustments(dims={"N": BATCH} if dims is None else dims)
    return prepare(open_model(model, adjustments), adjustments=adjustments, states=pairs)


def test_pairs_may_come_as_a_dictionary_or_as_pairs() -> None:
    assert list_pairs(RECURRENT) == list_pairs([("h_out", "h_in")]) == (("h_out", "h_in"),)


def test_a_state_is_a_buffer_of_zeros_and_no_longer_data() -> None:
    prepared = prepare_states(build_recurrent(), [("h_out", "h_in")])
    assert prepared.roles["h_in"] is Role.BUFFER
    assert "h_in" in prepared.state
    np.testing.assert_array_equal(prepared.weights["h_in"].numpy(), np.zeros((BATCH, 5)))
    assert prepared.weights["h_in"].numpy().dtype == np.float32


def test_a_weight_that_only_scales_a_state_is_trained() -> None:
    given = prepare_states(build_recurrent(), [])
    assert given.roles["decay"] is Role.FROZEN
    assert prepare_states(build_recurrent(), [("h_out", "h_in")]).roles["decay"] is Role.PARAMETER


def test_the_value_in_the_file_is_the_initial_one() -> None:
    initial = np.random.default_rng(0).standard_normal((BATCH, 5), np.float32)
    prepared = prepare_states(build_recurrent(initial), [("h_out", "h_in")])
    np.testing.assert_array_equal(prepared.weights["h_in"].numpy(), initial)
    assert "h_in" in prepared.skeleton.graph.initializers
    assert "h_in" in {value.name for value in prepared.skeleton.graph.inputs}


@pytest.mark.parametrize("dims", [{"h_in:0": BATCH}, {"x:0": BATCH, "h_in:0": BATCH}])
def test_one_fixed_batch_fixes_the_others(dims: Dims) -> None:
    assert prepare_states(build_recurrent(), [("h_out", "h_in")], dims).weights["h_in"].size == 20


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([("h_in", "h_out")], r"write the output first, as --state h_out=h_in$"),
        ([("q", "h_in")], r"--state q=h_in: the model has no output 'q'; it has 'y', 'h_out'$"),
        ([("h_out", "q")], r"the model has no input 'q'; it has 'x', 'h_in'$"),
        ([("h_out", "w")], r"the model has no input 'w'"),
        ([("h_out", "h_in"), ("y", "h_in")], r"'h_in' gets the value of 'h_out' already"),
        ([("h_out", "x")], r"'h_out' is \[4, 5\], and 'x' \[4, 3\]; a state keeps its shape$"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_refused(
    pairs: list[tuple[str, str]], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        prepare_states(build_recurrent(), pairs)


def test_a_state_of_variable_shape_is_refused_with_the_option_that_fixes_it() -> None:
    reason = r"'h_in' is \[N, 5\].*its shape must be fixed, also the size of the batch; add --dim N"
    with pytest.raises(UsageError, match=reason):
        prepare_states(build_recurrent(), [("h_out", "h_in")], {})


def build_odd() -> onnx.ModelProto:
    """Build a layer with an output of another type, or of variable size, and an idle input."""
    net = Net()
    net.op("MatMul", "x", net.weight("w", 3, 2), out="y")
    net.op("Cast", net.op("ReduceSum", "x", out="sum", keepdims=0), out="whole", to=INT64)
    net.op("Add", "x", "kept", out="wide")
    net.op("Add", "scalar", "scalar", out="twice")
    positive = net.op("Greater", "x", "scalar", out="positive")
    rows = net.op("Reshape", positive, net.constant("flat", np.array([-1])), out="rows")
    net.op("Compress", "x", rows, out="picked")
    net.op("Neg", "vector", out="minus")
    inputs: Shapes = {
        "x": (FLOAT, ["N", 3]),
        "kept": (FLOAT, [1, 3]),
        "scalar": (FLOAT, []),
        "idle": (FLOAT, []),
        "vector": (FLOAT, [3]),
    }
    outputs: Shapes = {"y": (FLOAT, ["N", 2]), "whole": (INT64, []), "wide": (FLOAT, ["N", 3])}
    scalars: Shapes = {
        "twice": (FLOAT, []),
        "sum": (FLOAT, []),
        "minus": (FLOAT, [3]),
        "picked": (FLOAT, ["K"]),
    }
    return close(net, inputs, {**outputs, **scalars})


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (("whole", "scalar"), "'whole' is INT64, and 'scalar' FLOAT; a state keeps its type"),
        (("wide", "kept"), r"'wide' is \[N, 3\], .* fix its sizes with --dim N=SIZE"),
        (("picked", "vector"), r"'picked' is \[.*\], .* export the model with fixed sizes"),
        (("sum", "idle"), "no node reads 'idle', so nothing would be carried"),
    ],
)
def test_what_cannot_replace_a_state_is_refused(pair: tuple[str, str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        prepare_states(build_odd(), [pair], {})


def test_the_loss_is_not_computed_from_a_state_unless_it_is_named() -> None:
    model = build_recurrent()
    model.graph.output.insert(0, model.graph.output.pop(1))
    prepared = prepare_states(model, [("h_out", "h_in")])
    assert choose_output(prepared, None) == "y"
    assert choose_output(prepared, "h_out") == "h_out"
    assert choose_output(prepare_states(model, []), None) == "h_out"
