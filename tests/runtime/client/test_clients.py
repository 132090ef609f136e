import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import (
    ArrayMismatch,
    BundleError,
    BundleMismatch,
    ConnectionLost,
    DataError,
    LocalProtocolError,
    NotFinite,
    RemoteFault,
    RemoteProtocolError,
    ServerBusy,
    UnusableData,
    UsageError,
)
from splitonnx.messages import (
    Fault,
    Hello,
    Message,
    Tensors,
    Welcome,
    decode_message,
    encode_message,
)
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.histories import Evaluation, StepRecord
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import MemoryTransport, connect_in_memory
from tests.support import tiny

DATA = {
    name: np.concatenate([tiny.batch(seed)[name] for seed in range(5)]) for name in ("x", "labels")
}
"""30 samples."""


def local_client(seed: int = 0) -> Client:
    return Client(tiny.local_bundle().client, threads=1, seed=seed)


def split_client(seed: int = 0) -> tuple[Client, MemoryTransport]:
    bundle = tiny.split_bundle()
    assert bundle.server is not None
    server = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    return Client(bundle.client, server, threads=1, seed=seed), server


DIGEST = tiny.split_bundle().manifest.digest
WIRES = {"train": tiny.TRAIN_WIRES, "predict": tiny.PREDICT_WIRES}
WELCOME = Welcome(session="s", digest=DIGEST, step=0, wires=WIRES)


def answer(step: int = 0, turn: int = 0) -> Tensors:
    return Tensors(
        session="s",
        phase="train",
        step=step,
        micro_batch=0,
        turn=turn,
        seed=0,
        learning_rate=tiny.RATE,
    )


class Scripted:
    """A server that gives prepared answers in the client's session, whatever it is sent.

    An answer is a message, tensors that go with the first step's, or the loss of the connection.
    """

    def __init__(self, *answers: Message | dict[str, np.ndarray] | ConnectionLost) -> None:
        self._answers = list(answers)
        self.bytes_sent = self.bytes_received = 0
        self.said: list[str] = []
        self._session = ""
        self._turn = 0

    def send(self, chunks: Sequence[bytes | memoryview]) -> None:
        message, _ = decode_message(b"".join(chunks))
        self.said.append(type(message).__name__)
        if isinstance(message, Hello):
            self._session = message.session

    def receive(self) -> bytes:
        given = self._answers.pop(0)
        if isinstance(given, ConnectionLost):
            raise given
        if isinstance(given, dict):
            message = msgspec.structs.replace(answer(turn=self._turn), session=self._session)
            self._turn += 1
            return b"".join(encode_message(message, given))
        if isinstance(given, Tensors | Welcome):
            given = msgspec.structs.replace(given, session=self._session)
        return b"".join(encode_message(given))

    def close(self) -> None:
        self.said.append("closed")


def test_fitting_a_whole_model_takes_the_steps_that_numpy_takes() -> None:
    reference = tiny.reference_state()
    with local_client() as client:
        history = client.fit(DATA, epochs=2, batch_size=6, shuffle=False)
    expected = [tiny.reference_step(reference, tiny.batch(n)) for n in (*range(5), *range(5))]
    np.testing.assert_allclose([r.loss for r in history.steps], expected, rtol=1e-4)
    assert [r.step for r in history.steps] == list(range(1, 11))
    assert [r.epoch for r in history.steps] == [0] * 5 + [1] * 5
    for name, array in client.state().items():
        np.testing.assert_allclose(array, reference[name], rtol=1e-4, atol=1e-6)


def test_fitting_split_equals_fitting_whole_bit_for_bit() -> None:
    whole = local_client()
    split, server = split_client()
    with split:
        losses = [r.loss for r in split.fit(DATA, epochs=2, batch_size=7).steps]
        assert losses == [r.loss for r in whole.fit(DATA, epochs=2, batch_size=7).steps]
        for name, array in split.predict(DATA).items():
            np.testing.assert_array_equal(array, whole.predict(DATA)[name])
        assert split.evaluate(DATA) == whole.evaluate(DATA)
    state = split.state() | server.executor.state()
    for name, array in whole.state().items():
        np.testing.assert_array_equal(state[name], array)


def test_the_seed_decides_the_order_of_the_samples() -> None:
    def losses(seed: int) -> list[float]:
        return [r.loss for r in local_client(seed).fit(DATA, batch_size=10).steps]

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_the_learning_rate_is_the_optimizer_s_own_or_a_constant_or_a_schedule() -> None:
    for rate, rates in (
        (None, [tiny.RATE] * 3),
        (0.02, [0.02] * 3),
        (lambda step: 0.1 / (step + 1), [0.1, 0.05, 0.1 / 3]),
    ):
        reference = tiny.reference_state()
        client = local_client()
        client.fit([tiny.batch(n) for n in range(3)], learning_rate=rate)
        for n in range(3):
            tiny.reference_step(reference, tiny.batch(n), rates[n])
        np.testing.assert_allclose(client.state()["W1"], reference["W1"], rtol=1e-4, atol=1e-6)


def test_prediction_and_evaluation_do_not_depend_on_the_batch_size() -> None:
    client = local_client()
    y = tiny.reference_predict(tiny.WEIGHTS, DATA["x"])
    for size in (30, 7):
        predicted = client.predict({"x": DATA["x"]}, batch_size=size)
        np.testing.assert_allclose(predicted["y"], y, rtol=1e-4, atol=1e-5)
        metrics = client.evaluate(DATA, batch_size=size)
        assert metrics == {
            "loss": pytest.approx(np.mean((y - DATA["labels"]) ** 2), rel=1e-5),
            "mae": pytest.approx(np.mean(abs(y - DATA["labels"])), rel=1e-5),
        }
    assert client.steps == 0


def test_a_single_step_gives_the_loss_and_counts() -> None:
    client = local_client()
    expected = tiny.reference_step(tiny.reference_state(), tiny.batch(0))
    np.testing.assert_allclose(client.step(tiny.batch(0))["loss"], expected, rtol=1e-5)
    assert client.steps == 1


def test_records_come_as_they_happen_and_as_lines_of_json() -> None:
    steps: list[StepRecord] = []
    epochs: list[Evaluation] = []
    client, _ = split_client()
    history = client.fit(
        DATA,
        epochs=2,
        batch_size=20,
        eval_data=tiny.batch(9),
        on_step=steps.append,
        on_epoch=epochs.append,
    )
    assert history.steps == steps
    assert history.evaluations == epochs
    assert [r.samples for r in steps] == [20, 10, 20, 10]
    assert [e.epoch for e in epochs] == [0, 1]
    assert epochs[1].metrics == client.evaluate(tiny.batch(9))
    lines = [json.loads(line) for line in history.as_json()]
    assert [line["samples"] for line in lines[:4]] == [20, 10, 20, 10]
    assert lines[5]["metrics"]["mae"] == epochs[1].metrics["mae"]
    seconds = sum(r.seconds for r in steps)
    assert history.samples_per_second == pytest.approx(60 / seconds)


def test_a_start_is_told_once_before_the_first_step_and_not_where_the_data_are_refused() -> None:
    events: list[str] = []
    client, _ = split_client()
    with pytest.raises(DataError):
        client.fit({"x": DATA["x"]}, on_start=lambda: events.append("start"))
    assert events == []
    client.fit(
        DATA,
        batch_size=20,
        on_start=lambda: events.append("start"),
        on_step=lambda record: events.append("step"),
    )
    assert events == ["start", "step", "step"]


def test_the_traffic_of_a_step_is_what_its_wires_weigh_and_a_little_more() -> None:
    client, _ = split_client()
    first, second = client.fit(DATA, batch_size=20, shuffle=False).steps
    up, down = (4 + 2) * 4, 4 * 4  # bytes a sample: h and labels, the gradient of h
    assert 20 * up <= first.bytes_up <= 20 * up + 1024
    assert 20 * down + 4 <= first.bytes_down <= 20 * down + 1024
    assert 10 * up <= second.bytes_up < first.bytes_up
    assert local_client().fit(DATA).steps[0].bytes_up == 0


def test_data_that_do_not_fit_stop_before_anything_is_sent_and_the_client_goes_on() -> None:
    client, _ = split_client()
    data = {name: array.copy() for name, array in DATA.items()}
    data["x"][17, 2] = np.nan
    with pytest.raises(NotFinite, match=r"'x'.*row 17"):
        client.fit(data, batch_size=30)
    with pytest.raises(NotFinite, match=r"'x'.*row 17"):
        client.step(data)
    with pytest.raises(ArrayMismatch, match="astype"):
        client.fit({**DATA, "x": DATA["x"].astype(np.float64)})
    with pytest.raises(ArrayMismatch, match="'labels'"):
        client.fit(DATA, eval_data={**DATA, "labels": DATA["labels"][:, :1]})
    assert client.steps == 0
    assert client.step(tiny.batch(0))["loss"] > 0


def test_a_loss_that_is_not_finite_leaves_both_sides_as_they_were() -> None:
    huge = {**tiny.batch(0), "x": np.full((6, 3), 1e30, np.float32)}
    split, server = split_client()
    for client in (local_client(), split):
        with pytest.raises(NotFinite, match="'loss' holds NaN or infinity"):
            client.step(huge)
        assert client.steps == 0
        np.testing.assert_array_equal(client.state()["W1"], tiny.WEIGHTS["W1"])
    assert server.executor.step == 0
    np.testing.assert_array_equal(server.executor.state()["W2"], tiny.WEIGHTS["W2"])


def test_a_part_needs_a_server_and_a_whole_model_none() -> None:
    with pytest.raises(UsageError, match="name the server"):
        Client(tiny.split_bundle().client)
    with pytest.raises(UsageError, match="left whole"):
        Client(tiny.local_bundle().client, Scripted())


def test_counts_below_one_and_negative_seeds_are_refused() -> None:
    with pytest.raises(UsageError, match="seed"):
        local_client(seed=-1)
    with pytest.raises(UsageError, match="epochs must be at least 1, not 0"):
        local_client().fit(DATA, epochs=0)
    with pytest.raises(UsageError, match="batch_size"):
        local_client().predict(DATA, batch_size=0)


def test_an_iterator_cannot_serve_two_epochs() -> None:
    def generate() -> Iterator[dict[str, np.ndarray]]:
        yield tiny.batch(0)

    with pytest.raises(UnusableData, match="one epoch"):
        local_client().fit(generate(), epochs=2)


def test_a_model_with_a_fixed_batch_size_leaves_the_smaller_last_batch_out() -> None:
    history = Client(tiny.fixed_bundle()).fit(DATA, batch_size=8)
    assert [record.samples for record in history.steps] == [8, 8, 8]


def test_what_the_bundle_cannot_do_is_said() -> None:
    bundle = tiny.local_bundle().client
    train = msgspec.structs.replace(bundle.manifest, phases=bundle.manifest.phases[:1])
    client = Client(replace(bundle, manifest=train))
    with pytest.raises(UsageError, match="nothing to predict with"):
        client.evaluate(DATA)


def test_saving_a_whole_model_is_seen_by_the_next_client(tmp_path: Path) -> None:
    tiny.local_bundle().save(tmp_path / "bundle")
    with Client(tmp_path / "bundle" / "client", threads=1) as client:
        client.fit(DATA, batch_size=10)
        client.save()
    again = Client(str(tmp_path / "bundle" / "client"), threads=1)
    assert again.steps == 3
    for name, array in client.state().items():
        np.testing.assert_array_equal(again.state()[name], array)
    with pytest.raises(BundleError, match="memory"):
        local_client().save()


def test_saving_a_split_model_saves_both_parts(tmp_path: Path) -> None:
    tiny.split_bundle().save(tmp_path / "bundle")
    server = PartyBundle.load(tmp_path / "bundle" / "server")
    channel = connect_in_memory(Executor(server, Engine(threads=1)))
    with Client(tmp_path / "bundle" / "client", channel, threads=1) as client:
        client.fit(DATA, batch_size=10)
        client.save()
        state = client.state() | channel.executor.state()
    saved = Bundle.load(tmp_path / "bundle")
    assert {party.step for party in saved.parties.values()} == {3}
    for party in saved.parties.values():
        for name, array in party.state().items():
            np.testing.assert_array_equal(array, state[name])


@pytest.mark.parametrize(
    ("greeting", "error", "sentence"),
    [
        (Fault(code="ServerBusy", reason="9 sessions"), ServerBusy, "full .9 sessions"),
        (Fault(code="BundleMismatch", reason="not mine"), RemoteFault, "BundleMismatch: not mine"),
        (msgspec.structs.replace(WELCOME, digest="e5"), BundleMismatch, "digest is d1.*e5 there"),
        (msgspec.structs.replace(WELCOME, step=4), RemoteProtocolError, "continue at step 4"),
        (answer(), RemoteProtocolError, "Tensors while greeting"),
        (ConnectionLost("the server", "refused"), ConnectionLost, "refused"),
    ],
)
def test_a_client_that_is_not_welcome_says_why_and_hangs_up(
    greeting: Message | ConnectionLost, error: type[Exception], sentence: str
) -> None:
    server = Scripted(greeting)
    with pytest.raises(error, match=sentence):
        Client(tiny.split_bundle().client, server)
    assert server.said == ["Hello", "closed"]


GRADIENT = {"h.grad": np.zeros((6, 4), np.float32)}


@pytest.mark.parametrize(
    ("answers", "error", "sentence"),
    [
        ([ConnectionLost("the server", "gone")], ConnectionLost, "gone"),
        ([GRADIENT, ConnectionLost("the server", "gone")], ConnectionLost, "gone"),
        ([Fault(code="StageFailed", reason="stage")], RemoteFault, "StageFailed: stage"),
        ([answer(step=1)], RemoteProtocolError, "step=1.*open is.*step=0"),
        ([answer(turn=1)], RemoteProtocolError, "message 1 where 0 was due"),
        ([GRADIENT, GRADIENT], RemoteProtocolError, "not expected now"),
        ([{"h.grad": np.zeros((5, 4), np.float32)}], ArrayMismatch, r"where N = 6"),
        ([{"h": np.zeros((6, 4), np.float32)}], RemoteProtocolError, "'h' is not a wire"),
    ],
)
def test_a_step_that_breaks_off_leaves_the_state_and_closes_the_client(
    answers: list[Message | dict[str, np.ndarray] | ConnectionLost],
    error: type[Exception],
    sentence: str,
) -> None:
    server = Scripted(WELCOME, *answers)
    client = Client(tiny.split_bundle().client, server)
    with pytest.raises(error, match=sentence):
        client.step(tiny.batch(0))
    assert client.steps == 0
    np.testing.assert_array_equal(client.state()["W1"], tiny.WEIGHTS["W1"])
    assert server.said[-1] == "closed"
    for act in (lambda: client.step(tiny.batch(0)), client.save):
        with pytest.raises(LocalProtocolError, match="client is closed"):
            act()


def test_leaving_the_client_says_good_bye_once() -> None:
    server = Scripted(WELCOME)
    with Client(tiny.split_bundle().client, server) as client:
        client.close()
    assert server.said == ["Hello", "Bye", "closed"]
