"""A client's link: how it waits where its server comes and goes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from unittest.mock import patch

import msgspec
import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost, RemoteProtocolError, StepsLost
from splitonnx.messages import (
    Hello,
    Save,
    Saved,
    TaskKey,
    Tensors,
    Welcome,
    decode_message,
    encode_message,
)
from splitonnx.names import SHARE
from splitonnx.runtime.channels.channels import Channel
from splitonnx.runtime.channels.greetings import ResumePoint
from splitonnx.runtime.channels.retries import Backoff
from splitonnx.runtime.wire.protocols import list_wires
from splitonnx.sharing import LEAVES, ROUND, SAMPLES
from tests.support import tiny
from tests.support.sharing import sharing_bundle

SESSION = "5" * 32
KEY = TaskKey(session=SESSION, phase="train", step=0, micro_batch=0)


class Fleeting:
    """A connection that welcomes, takes so many messages of a task, and breaks at the next."""

    def __init__(self, bundle: Bundle, takes: int) -> None:
        self.bytes_sent = self.bytes_received = 0
        self._bundle = bundle
        self._left = takes
        self._sent: object = None

    def send(self, chunks: Sequence[Chunk]) -> None:
        self._sent, _ = decode_message(b"".join(chunks))
        if isinstance(self._sent, Tensors):
            self._left -= 1
            if self._left < 0:
                raise ConnectionLost("the server", "it closed")

    def receive(self) -> bytes:
        manifest = self._bundle.client.manifest
        wires = list_wires(manifest)
        welcome = Welcome(session=SESSION, digest=manifest.digest, step=0, wires=wires)
        if isinstance(self._sent, Save):
            return b"".join(encode_message(Saved(session=SESSION, step=self._sent.step)))
        said = self._sent if isinstance(self._sent, Tensors) else welcome
        return b"".join(encode_message(said))

    def close(self) -> None:
        pass


def test_waits_grow_until_an_answer_comes_though_every_connection_is_welcomed() -> None:
    bundle = tiny.split_bundle()
    takes = iter([0] * 6 + [1, 2])
    waits: list[float] = []
    with patch("splitonnx.runtime.channels.channels.time.sleep", waits.append):
        channel = Channel(
            lambda: Fleeting(bundle, next(takes)),
            manifest=bundle.client.manifest,
            session=SESSION,
            find_resume_point=lambda: ResumePoint(origin="", start=0, step=0, kept=()),
            backoff=Backoff(first=1.0, longest=8.0),
        )
        channel.send_wires(KEY, {}, seed=0, learning_rate=0.1)
        bounds = [0, 1, 2, 4, 8, 8]
        assert waits == [pytest.approx(0.75 * bound, abs=0.25 * bound) for bound in bounds]
        channel.receive_wires()
        waits.clear()
        channel.send_wires(KEY, {}, seed=0, learning_rate=0.1)
        assert waits == [0]


class Repeating:
    """A server that welcomes, answers a task's first message, and says what it is told after."""

    def __init__(self, bundle: Bundle, turns: Sequence[int]) -> None:
        self.bytes_sent = self.bytes_received = 0
        self._bundle = bundle
        self._turns = iter(turns)
        self._sent: object = None

    def send(self, chunks: Sequence[Chunk]) -> None:
        self._sent, _ = decode_message(b"".join(chunks))

    def receive(self) -> bytes:
        manifest = self._bundle.client.manifest
        if not isinstance(self._sent, Tensors):
            wires = list_wires(manifest)
            welcome = Welcome(session=SESSION, digest=manifest.digest, step=0, wires=wires)
            return b"".join(encode_message(welcome))
        turn = next(self._turns, None)
        if turn is None:
            raise ConnectionLost("the server", "it closed")
        return b"".join(encode_message(msgspec.structs.replace(self._sent, turn=turn)))

    def close(self) -> None:
        pass


def open_link(bundle: Bundle, *servers: Sequence[int]) -> Channel:
    """Open a link, and a task in it, to a server that gives such answers on each connection."""
    answers = iter(servers)
    channel = Channel(
        lambda: Repeating(bundle, next(answers)),
        manifest=bundle.client.manifest,
        session=SESSION,
        find_resume_point=lambda: ResumePoint(origin="", start=0, step=0, kept=()),
        backoff=Backoff(first=0.0, longest=0.0),
    )
    channel.send_wires(KEY, {}, seed=0, learning_rate=0.1)
    return channel


@pytest.mark.parametrize("turn", [0, 2, 2**60])
def test_a_server_that_repeats_itself_unasked_is_not_listened_to(turn: int) -> None:
    channel = open_link(tiny.split_bundle(), [0, turn, 1])
    channel.receive_wires()
    with pytest.raises(RemoteProtocolError, match=f"sent message {turn} where 1 was due"):
        channel.receive_wires()


def test_on_a_new_connection_an_answer_comes_again_once() -> None:
    channel = open_link(tiny.split_bundle(), [0], [0, 1], [0, 0, 1])
    for _ in range(2):  # the second one after it reconnected
        channel.receive_wires()
    with pytest.raises(RemoteProtocolError, match="sent message 0 where 1 was due"):
        channel.receive_wires()


@pytest.mark.parametrize("answers", [0, 1])
def test_a_server_that_brings_nothing_new_and_hangs_up_is_given_up_in_the_end(answers: int) -> None:
    """Nor is an answer new that comes on each connection again."""
    bundle = tiny.split_bundle()
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    with (
        patch("splitonnx.runtime.channels.channels.time.sleep", sleep),
        patch("splitonnx.runtime.channels.channels.time.monotonic", lambda: now),
    ):
        channel = Channel(
            lambda: Repeating(bundle, [0]) if answers else Fleeting(bundle, 0),
            manifest=bundle.client.manifest,
            session=SESSION,
            find_resume_point=lambda: ResumePoint(origin="", start=0, step=0, kept=()),
            backoff=Backoff(first=1.0, longest=8.0, give_up_after=30.0),
        )
        ask = partial(channel.send_wires, KEY, {}, seed=0, learning_rate=0.1)
        if answers:
            ask()
            channel.receive_wires()
        with pytest.raises(ConnectionLost):
            (channel.receive_wires if answers else ask)()
    assert now == pytest.approx(30.0)


def test_a_server_that_does_not_know_how_to_keep_a_state_did_not_save_it() -> None:
    bundle = tiny.split_bundle()
    channel = Channel(
        lambda: Fleeting(bundle, 0),
        manifest=bundle.client.manifest,
        session=SESSION,
        find_resume_point=lambda: ResumePoint(origin="", start=0, step=0, kept=()),
        backoff=Backoff(),
    )
    assert channel.save(0) == ""
    assert "cannot keep the best state" in channel.save(0, keep=True)


def test_a_server_that_lost_the_state_to_return_to_has_lost_steps() -> None:
    bundle = tiny.split_bundle()
    points = [ResumePoint(origin="", start=0, step=0, kept=())]
    channel = Channel(
        lambda: Fleeting(bundle, 0),
        manifest=bundle.client.manifest,
        session=SESSION,
        find_resume_point=lambda: points[-1],
        backoff=Backoff(),
    )
    assert channel.can_reconnect
    channel.return_to_step()
    points.append(ResumePoint(origin="", start=0, step=5, kept=(5, 0)))
    with pytest.raises(StepsLost):
        channel.return_to_step()


@pytest.mark.parametrize(("does_share", "can_repeat"), [(False, True), (True, False)])
def test_a_step_is_not_repeated_behind_what_was_shared_after_it(
    does_share: bool, can_repeat: bool
) -> None:
    """The server would have the step again, and not what it received with the share."""
    bundle = sharing_bundle()
    points = [ResumePoint(origin="", start=0, step=0, kept=())]
    greetings: list[Hello] = []
    weight = np.zeros((3, 4), np.float32)
    shared = {"W1@own": weight, SAMPLES: np.array(1), LEAVES: np.array(0)}
    joined = {"W1@joined": weight, ROUND: np.array(1)}

    class Listening(Repeating):
        def send(self, chunks: Sequence[Chunk]) -> None:
            super().send(chunks)
            if isinstance(self._sent, Hello):
                greetings.append(self._sent)
                assert len(greetings) < 3

        def receive(self) -> bytes:
            if isinstance(self._sent, Save):
                raise ConnectionLost("the server", "it was killed")
            if isinstance(self._sent, Tensors) and self._sent.phase == SHARE:
                return b"".join(encode_message(self._sent, joined))
            return super().receive()

    channel = Channel(
        lambda: Listening(bundle, [0, 0]),
        manifest=bundle.client.manifest,
        session=SESSION,
        find_resume_point=lambda: points[-1],
        backoff=Backoff(first=0.0, longest=0.0),
    )
    for phase in ("train", "share") if does_share else ("train",):
        key = TaskKey(session=SESSION, phase=phase, step=points[-1].step, micro_batch=0)
        channel.send_wires(key, shared if phase == SHARE else {}, seed=0, learning_rate=0.1)
        channel.receive_wires()
        if phase == "train":  # its last message has no answer
            channel.send_wires(key, {}, seed=0, learning_rate=0.1)
        channel.end(key)
        points.append(ResumePoint(origin="", start=0, step=1, kept=(1, 0)))
    with pytest.raises(StepsLost):  # the server is at step 0
        channel.save(1)
    assert greetings[-1].can_repeat is can_repeat
