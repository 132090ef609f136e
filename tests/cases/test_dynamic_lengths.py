"""A recurrence over a symbolic length: each batch has its own, or one size is set for all."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from splitonnx.errors import ArrayMismatch, StageFailed, UnsupportedModel
from splitonnx.names import Target
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut, cut_prepared
from splitonnx.partitioner.reports.inspections import list_cuts
from splitonnx.runtime.client.clients import Client
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.small_models import Arrays, hold_predictions, hold_step, load_model
from tests.support.zoo import FLOAT, Net

NAME = "11_lstm_dynamic_time"
LENGTH = {"T": 100}


def draw(rows: int, length: int = LENGTH["T"]) -> Arrays:
    random = np.random.default_rng(2)
    return {
        "x": random.standard_normal((rows, length, 4), np.float32),
        "labels": random.integers(0, 4, rows),
    }


@pytest.mark.parametrize("target", TARGETS)
def test_a_length_of_100_trains_split_as_unsplit(target: Target) -> None:
    model, data = load_model(NAME), draw(12)
    bundle = cut(model, at="h", dims=LENGTH, client_target=target, server_target=target)
    hold_predictions(bundle, model, data)
    assert verify(bundle, data, batch_size=6, steps=2).ok
    whole = cut(model, at=None, dims=LENGTH, client_target=target, server_target=target)
    hold_predictions(whole, model, draw(3))
    hold_step(whole, model, draw(2), ["W", "R", "B", "fw", "fb"])


def test_data_of_another_length_are_refused() -> None:
    bundle = cut(load_model(NAME), at="h", dims=LENGTH)
    with pytest.raises(ArrayMismatch, match=r"\[N, 100, 4\], but is F32\[4, 99, 4\]"):
        verify(bundle, draw(4, length=99), batch_size=4)


LENGTHS = [(5, 7), (3, 1), (1, 40), (1, 1)]
"""Sequences of each batch, and their length."""


@pytest.mark.parametrize("target", TARGETS)
def test_batches_of_any_length_train_split_as_unsplit(target: Target) -> None:
    batches = [draw(*sizes) for sizes in LENGTHS]
    bundle = cut(load_model(NAME), at="h", client_target=target, server_target=target)
    for data in batches:
        hold_predictions(bundle, load_model(NAME), data)
    assert verify(bundle, batches, steps=4).largest_difference == 0.0


@pytest.mark.parametrize("sizes", LENGTHS)
@pytest.mark.parametrize("target", TARGETS)
def test_the_gradients_of_any_length_are_those_of_the_model(
    sizes: tuple[int, int], target: Target
) -> None:
    model = load_model(NAME)
    whole = cut(model, at=None, client_target=target)
    hold_step(whole, model, draw(*sizes), ["W", "R", "B", "fw", "fb"])


def test_a_length_of_0_is_refused() -> None:
    with Client(cut(load_model(NAME), at=None).client, threads=1) as client:
        for work in (client.fit, client.predict):
            with pytest.raises(ArrayMismatch, match="without an empty dimension"):
                work([draw(2, 0)])


def write_layers(*, batch: int | str = "N") -> onnx.ModelProto:
    """Write a bidirectional LSTM, a GRU in reverse and an RNN, each of which reads the last.

    The RNN begins with the last state of the LSTM.
    """
    net = Net(opset=17)
    net.constant("two", np.array([2]))
    net.constant("whole", np.array([0, 0, -1]))

    def recur(
        kind: str, x: str, size: int, outputs: list[str], *more: str, direction: str = "forward"
    ) -> None:
        gates = {"LSTM": 16, "GRU": 12, "RNN": 4}[kind]
        both = 2 if direction == "bidirectional" else 1
        names = [net.weight(f"{kind}.{n}", both, *dims) for n, dims in (
            ("w", (gates, size)), ("r", (gates, 4)), ("b", (2 * gates,)))]  # fmt: skip
        node = helper.make_node(kind, [x, *names, *more], outputs, hidden_size=4,
                                direction=direction)  # fmt: skip
        net.nodes.append(node)

    recur("LSTM", "x", 3, ["y0", "h0"], direction="bidirectional")
    net.op("Transpose", "y0", out="turned", perm=[0, 2, 1, 3])
    net.op("Reshape", "turned", "whole", out="joined")
    recur("GRU", "joined", 8, ["y1", ""], direction="reverse")
    net.op("Squeeze", "y1", net.constant("one", np.array([1])), out="again")
    net.op("Tanh", "again", out="bent")
    net.op("ReduceSum", "h0", net.constant("zero", np.array([0])), out="first", keepdims=1)
    recur("RNN", "bent", 4, ["", "h2"], "", "first")
    net.op("Squeeze", "h2", "zero", out="last")
    net.op("MatMul", "last", net.weight("v", 4, 2), out="scores")
    return net.finish({"x": (FLOAT, ["T", batch, 3])}, "scores", 2)


TRAINED = [f"{kind}.{name}" for kind in ("LSTM", "GRU", "RNN") for name in "wrb"]


@pytest.mark.parametrize("target", TARGETS)
def test_layers_that_read_each_other_have_the_gradients_of_the_model(target: Target) -> None:
    model = write_layers()
    random = np.random.default_rng(3)
    bundle = cut(model, at=None, loss="mse", client_target=target)
    for length, rows in ((5, 2), (1, 1)):
        data = {
            "x": random.standard_normal((length, rows, 3), np.float32),
            "labels": random.standard_normal((rows, 2), np.float32),
        }
        hold_step(bundle, model, data, [*TRAINED, "v"], loss="mse")


@pytest.mark.parametrize("target", TARGETS)
def test_a_cut_falls_between_layers_or_around_them(target: Target) -> None:
    prepared = prepare(open_model(write_layers()))
    places = [candidate.tensor for candidate in list_cuts(prepared, None)]
    assert {"joined", "bent", "last"} & set(places)
    random = np.random.default_rng(3)
    batches = [
        {
            "x": random.standard_normal((length, 3, 3), np.float32),
            "labels": random.standard_normal((3, 2), np.float32),
        }
        for length in (4, 1, 9)
    ]
    for at, tail in [*((place, ()) for place in places), (places[0], places[-1])]:
        bundle = cut_prepared(
            prepared, at=at, tail_at=tail, loss="mse", client_target=target, server_target=target
        )
        assert verify(bundle, batches, steps=3).largest_difference == 0.0, (at, tail)


def write_masked(lens: list[int] | None = None) -> onnx.ModelProto:
    """Write a GRU with the lengths of its sequences, which are data unless they are given."""
    net = Net(opset=17)
    given = "lens" if lens is None else net.constant("fixed", np.array(lens, np.int32))
    weights = [net.weight("w", 1, 12, 3), net.weight("r", 1, 12, 4)]
    net.nodes.append(helper.make_node("GRU", ["x", *weights, "", given], ["", "hs"], hidden_size=4))
    net.op("Squeeze", "hs", net.constant("zero", np.array([0])), out="last")
    net.op("MatMul", "last", net.weight("v", 4, 2), out="scores")
    data: dict[str, tuple[int, list[int | str]]] = {"x": (FLOAT, ["T", "N", 3])}
    if lens is None:
        data["lens"] = (TensorProto.INT32, ["N"])
    return net.finish(data, "scores", 2)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("lens", [[2, 0], [3, 1]])
def test_sequences_without_a_step_are_refused_in_training_and_prediction(
    lens: list[int], target: Target
) -> None:
    bundle = cut(write_masked(), at=None, loss="mse", client_target=target)
    data = {
        "x": np.ones((3, 2, 3), np.float32),
        "lens": np.array(lens, np.int32),
        "labels": np.ones((2, 2), np.float32),
    }
    for is_training in (True, False):
        with Client(bundle.client, threads=1) as client:
            work = partial(client.step, data) if is_training else partial(client.predict, [data])
            if min(lens):
                work()
                continue
            with pytest.raises(StageFailed, match="sequence_lens_must_be_1_to_steps"):
                work()


def test_constant_lengths_of_0_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"GRU.*sequence_lens are 0 to 2"):
        cut(write_masked([2, 0]), at=None, loss="mse")
