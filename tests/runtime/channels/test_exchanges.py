"""A client's side of a session as an event machine: what it does and tells, whatever happens."""

from __future__ import annotations

import json
from collections import deque
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from splitonnx.errors import ConnectionLost
from splitonnx.messages import Hello, TaskKey, Tensors, decode_message, encode_message
from splitonnx.runtime.channels.exchange_events import Connect, Failed, HangUp, Transmit
from tests.conftest import ROOT
from tests.support.exchange_players import (
    Recorder,
    make_answer,
    play_channel,
    record,
    take_all,
)
from tests.support.exchange_scripts import SCRIPTS, SESSION

VECTORS = json.loads((ROOT / "tests" / "vectors" / "exchanges.json").read_text())
TASKS = [TaskKey(SESSION, "accumulate", 0, number) for number in range(4)]
TURNS = 2
IN_FLIGHT = 3


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_followed_as_it_is_recorded(name: str) -> None:
    assert record(name) == VECTORS[name]


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_waiting_shell_follows_the_same_scripts(name: str, in_background: bool) -> None:
    transmitted, told = play_channel(name, in_background=in_background)
    follows = [one for entry in VECTORS[name] for one in entry["follows"]]
    assert transmitted == [one[1] for one in follows if one[0] == "transmit"]
    assert told == [one for one in follows if one[0] not in ("transmit", "connect", "hang up")]


class Exchanges(RuleBasedStateMachine):
    """A client with several open tasks, a server that remembers, and a network that may break."""

    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()
        self.up: deque[Tensors] = deque()
        self.down: deque[Tensors] = deque()
        self.sent: list[tuple[TaskKey, int]] = []  # as the client sent them first
        self.handled: list[tuple[TaskKey, int]] = []  # as the server handled them first
        self.received = dict.fromkeys(TASKS, 0)
        self.ended: list[TaskKey] = []
        self.is_up = False
        self.greetings = 0
        self.talk.start(0.0, is_patient=True)
        self.connect()
        self.talk.widen(IN_FLIGHT)
        self.talk.return_to_step(1.0)
        self.connect()

    @property
    def talk(self) -> Any:
        return self.recorder.exchange

    @property
    def next_sends(self) -> list[tuple[TaskKey, int]]:
        """Return the messages that a client may send: of open tasks, or of one that begins."""
        counts = {key: sum(own == key for own, _ in self.sent) for key in TASKS}
        opened = [key for key in TASKS if counts[key] and key not in self.ended]
        found = [
            (key, counts[key])
            for key in opened
            if counts[key] == self.received[key] and counts[key] < TURNS
        ]
        fresh = [key for key in TASKS if not counts[key]][:1]
        return found + [(key, 0) for key in fresh if len(opened) < IN_FLIGHT]

    def follow(self) -> None:
        """Do what the exchange wants done, and note what it tells."""
        for effect in take_all(self.talk.next_effect):
            match effect:
                case Transmit(chunks):
                    message = decode_message(b"".join(chunks))[0]
                    if isinstance(message, Tensors):
                        self.up.append(message)
                    else:
                        assert isinstance(message, Hello)
                        self.greetings += 1
                        unfinished = [key for key in TASKS if key not in self.ended]
                        opened = [key for key, _ in self.sent if key not in self.ended]
                        assert message.is_open == bool(opened)
                        if opened:
                            assert message.micro_batch == unfinished[0].micro_batch
                case HangUp():
                    self.up.clear()
                    self.down.clear()
                    self.is_up = False
                case Connect():
                    pass
        for outcome in take_all(self.talk.next_outcome):
            assert not isinstance(outcome, Failed)
            if hasattr(outcome, "key"):
                self.received[outcome.key] += 1

    def connect(self) -> None:
        """Let the client connect and greet, and the server welcome it."""
        self.recorder.now += 1.0
        self.talk.wake(self.recorder.now)
        self.follow()
        self.talk.connected()
        self.follow()
        self.is_up = True
        welcome = make_answer(self.recorder.manifest, "welcome", [{"in_flight": IN_FLIGHT}])
        self.talk.receive(b"".join(encode_message(welcome)), self.recorder.now)
        self.follow()

    @precondition(lambda self: self.next_sends)
    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        key, turn = data.draw(st.sampled_from(self.next_sends))
        self.sent.append((key, turn))
        self.talk.send(key, {}, 0, 0.1)
        self.follow()

    @precondition(lambda self: self.up)
    @rule()
    def handle(self) -> None:
        message = self.up.popleft()
        if (message.key, message.turn) not in self.handled:
            self.handled.append((message.key, message.turn))
        self.down.append(message)

    @precondition(lambda self: self.down)
    @rule()
    def reply(self) -> None:
        message = self.down.popleft()
        self.talk.receive(b"".join(encode_message(message)), self.recorder.now)
        self.follow()

    @precondition(lambda self: self.is_up)
    @rule()
    def cut(self) -> None:
        self.talk.lost(ConnectionLost("the server", "it closed"), self.recorder.now)
        self.follow()

    @precondition(lambda self: not self.is_up)
    @rule()
    def reconnect(self) -> None:
        self.connect()

    @precondition(lambda self: self.find_finished())
    @rule()
    def end(self) -> None:
        (key,) = self.find_finished()
        self.ended.append(key)
        self.talk.tasks.end(key)

    def find_finished(self) -> list[TaskKey]:
        """Return the oldest task that has not ended, if all its replies came."""
        oldest = TASKS[len(self.ended) : len(self.ended) + 1]
        return [key for key in oldest if self.received[key] == TURNS]

    @invariant()
    def each_message_is_handled_once_and_in_order(self) -> None:
        assert self.handled == self.sent[: len(self.handled)]
        for key in TASKS:
            assert self.received[key] <= sum(own == key for own, _ in self.handled)

    def teardown(self) -> None:
        """Whatever has happened: without further cuts, the exchange ends."""
        while len(self.ended) < len(TASKS):
            if not self.is_up:
                self.reconnect()
            elif self.find_finished():
                self.end()
            elif self.down:
                self.reply()
            elif self.up:
                self.handle()
            else:
                key, turn = self.next_sends[0]
                self.sent.append((key, turn))
                self.talk.send(key, {}, 0, 0.1)
                self.follow()
        assert self.handled == self.sent
        assert set(self.received.values()) == {TURNS}


TestExchanges = Exchanges.TestCase
TestExchanges.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
