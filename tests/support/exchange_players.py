"""Play scripts to a client's exchange and to its shells, and record what they do and tell."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost, SplitonnxError
from splitonnx.manifests import PartyManifest
from splitonnx.messages import (
    Bye,
    Fault,
    Hello,
    Message,
    Save,
    Saved,
    TaskKey,
    Tensors,
    Unsaved,
    Welcome,
    decode_message,
    encode_message,
)
from splitonnx.names import ACCUMULATE, UPDATE
from splitonnx.names import TRAIN as TRAIN_PHASE
from splitonnx.runtime.channels.channels import Channel
from splitonnx.runtime.channels.exchange_events import (
    Connect,
    Effect,
    Failed,
    Greeted,
    HangUp,
    Outcome,
    Replied,
    SaveAnswered,
    Transmit,
)
from splitonnx.runtime.channels.exchanges import Exchange
from splitonnx.runtime.channels.greetings import ResumePoint
from splitonnx.runtime.channels.retries import Backoff
from splitonnx.runtime.wire.protocols import list_wires
from tests.support import tiny
from tests.support.exchange_scripts import SCRIPTS, SESSION, Entry


class Recorder:
    """An exchange that is played a script, for the client of the tiny model."""

    def __init__(self, *, can_reconnect: bool = True) -> None:
        self.manifest = make_manifest()
        self.step = 0
        self.now = 0.0
        self.exchange = Exchange(
            manifest=self.manifest,
            session=SESSION,
            find_resume_point=self.find_resume_point,
            backoff=Backoff(first=0.0, longest=0.0),
            can_reconnect=can_reconnect,
        )

    def find_resume_point(self) -> ResumePoint:
        return ResumePoint(origin="", start=0, step=self.step, kept=tuple(range(self.step + 1)))

    def play(self, name: str, *arguments: Any) -> None:
        """Perform one entry of a script."""
        talk = self.exchange
        self.now += 1.0
        match name, arguments:
            case "start", (bool() as is_patient,):
                talk.start(self.now, is_patient=is_patient)
            case "connected", ():
                talk.connected()
            case "lost", ():
                talk.lost(ConnectionLost("the server", "it closed"), self.now)
            case "replaced", ():
                talk.lost(ConnectionLost("the server", "taken over", 4001), self.now)
            case "wake", ():
                talk.wake(self.now)
            case "send", (phase, step, number):
                talk.send(TaskKey(SESSION, phase, step, number), {}, 0, 0.1)
            case "end", (phase, step, number):
                talk.tasks.end(TaskKey(SESSION, phase, step, number))
            case "step", (step,):
                self.step = step
            case "widen", (in_flight,):
                if talk.widen(in_flight):
                    talk.return_to_step(self.now)
            case "return_to_step", ():
                talk.return_to_step(self.now)
            case "save", (step, publish, keep):
                talk.save(step, publish=publish, keep=keep)
            case "close", (for_good,):
                talk.close(for_good=for_good)
            case _:
                content = encode_message(make_answer(self.manifest, name, arguments))
                talk.receive(b"".join(content), self.now)

    def take(self) -> list[Any]:
        """Return what the exchange wants done and tells since the last time."""
        return [
            *map(describe_effect, take_all(self.exchange.next_effect)),
            *map(describe_outcome, take_all(self.exchange.next_outcome)),
        ]


def make_manifest() -> PartyManifest:
    """Return the manifest of the tiny model's client, whose steps may have micro-batches."""
    manifest = tiny.split_bundle().client.manifest
    train = manifest.phase(TRAIN_PHASE)
    added = (msgspec.structs.replace(train, name=name) for name in (ACCUMULATE, UPDATE))
    return msgspec.structs.replace(manifest, phases=(*manifest.phases, *added))


def make_answer(manifest: PartyManifest, name: str, arguments: Sequence[Any]) -> Message:
    """Make the server's message of an entry."""
    match name, arguments:
        case "welcome", (fields,):
            wires = list_wires(manifest)
            known = {"session": SESSION, "digest": manifest.digest, "step": 0, "wires": wires}
            return Welcome(**{**known, **fields})
        case "reply", (phase, step, number, turn):
            return Tensors(
                session=SESSION,
                phase=phase,
                step=step,
                micro_batch=number,
                turn=turn,
                seed=0,
                learning_rate=0.1,
            )
        case "saved", (step, keep):
            return Saved(session=SESSION, step=step, keep=keep)
        case "unsaved", (step, reason):
            return Unsaved(session=SESSION, step=step, reason=reason)
        case "fault", (code, reason, newest):
            return Fault(code=code, reason=reason, newest=newest)
    raise AssertionError(name)


def take_all(take: Callable[[], Any]) -> list[Any]:
    """Call a function until it returns nothing."""
    found: list[Any] = []
    while (one := take()) is not None:
        found.append(one)
    return found


def describe_effect(effect: Effect) -> list[Any]:
    """Return an effect as JSON can hold it; of a message, only what the scripts are about."""
    match effect:
        case Connect():
            return ["connect"]
        case HangUp():
            return ["hang up"]
        case Transmit(chunks):
            return ["transmit", describe_message(decode_message(b"".join(chunks))[0])]


def describe_message(message: Message) -> dict[str, Any]:
    """Return the fields of a client's message that scripts are about."""
    fields = msgspec.to_builtins(message)
    match message:
        case Hello():
            names = ["step", "generation", "is_open", "can_repeat", "micro_batch", "in_flight"]
        case Tensors():
            names = ["phase", "step", "micro_batch", "turn"]
        case Save():
            names = ["step", "publish", "keep"]
        case Bye():
            names = []
    return {"type": type(message).__name__, **{name: fields[name] for name in names}}


def describe_outcome(outcome: Outcome) -> list[Any]:
    """Return an outcome as JSON can hold it."""
    match outcome:
        case Greeted():
            return ["greeted"]
        case Replied(key, _):
            return ["replied", key.phase, key.step, key.micro_batch]
        case SaveAnswered(reason):
            return ["save answered", reason]
        case Failed(error):
            return ["failed", type(error).__name__]


def record(name: str) -> list[dict[str, Any]]:
    """Return the entries of a script, with what follows from each of them."""
    recorder = Recorder()
    entries = []
    for entry in SCRIPTS[name]:
        recorder.play(*entry)
        entries.append({"entry": list(entry), "follows": recorder.take()})
    return entries


def record_all() -> dict[str, Any]:
    """Return the recordings of all scripts."""
    return {name: record(name) for name in SCRIPTS}


ASKS = frozenset(
    {"start", "send", "end", "step", "widen", "return_to_step", "save", "close", "wake"}
)
"""The entries that are not told by a connection."""


class ScriptedConnection:
    """A connection on which happens what a script says; see :class:`transports.Transport`."""

    def __init__(self, play: ScriptPlayer) -> None:
        self.bytes_sent = self.bytes_received = 0
        self._play = play

    def send(self, chunks: Sequence[Chunk]) -> None:
        message = decode_message(b"".join(chunks))[0]
        self._play.transmitted.append(describe_message(message))

    def receive(self) -> bytes:
        name, *arguments = self._play.next_event()
        if name in ("lost", "replaced"):
            raise ConnectionLost("the server", "it closed", 4001 if name == "replaced" else None)
        answer = make_answer(self._play.manifest, name, arguments)
        return b"".join(encode_message(answer))

    def close(self) -> None:
        pass


class ScriptPlayer:
    """A script whose events come from connections, for a shell that waits for them."""

    def __init__(self, name: str, *, in_background: bool = False) -> None:
        self.in_background = in_background
        self.manifest = make_manifest()
        self.transmitted: list[dict[str, Any]] = []
        self.dials = 0
        self._script = deque(SCRIPTS[name])

    def dial(self) -> ScriptedConnection:
        name, *_ = self.next_event()
        self.dials += 1
        if name == "lost":
            raise ConnectionLost("the server", "it is away")
        assert name == "connected"
        return ScriptedConnection(self)

    def next_event(self) -> Entry:
        """Return what happens next outside; the shell wakes itself."""
        while self._script and self._script[0][0] == "wake":
            self._script.popleft()
        if not self._script or self._script[0][0] in ASKS:
            raise NothingHappens
        return self._script.popleft()

    def next_ask(self) -> Entry | None:
        """Return what the caller does next; without an ask, it waits for an outcome."""
        while self._script and self._script[0][0] == "wake":
            self._script.popleft()
        if not self._script:
            return None
        return self._script.popleft() if self._script[0][0] in ASKS else ["wait"]


class NothingHappens(BaseException):
    """Nothing happens before the caller's next ask, or any more, and the shell waits."""


def play_channel(name: str, *, in_background: bool) -> tuple[list[dict[str, Any]], list[Any]]:
    """Play a script to a blocking channel; return what was transmitted, and what it told."""
    player = ScriptPlayer(name, in_background=in_background)
    recorder = Recorder()
    told: list[Any] = []
    channels: list[Channel] = []
    while (ask := player.next_ask()) is not None:
        with suppress(NothingHappens):
            try:
                told += _ask_channel(ask, player, recorder, channels)
            except SplitonnxError as error:
                told.append(["failed", type(error).__name__])
    for channel in channels:
        channel.close(for_good=False)  # after all was sent
    return player.transmitted, told


def _ask_channel(
    ask: Entry, player: ScriptPlayer, recorder: Recorder, channels: list[Channel]
) -> list[Any]:
    name, *arguments = ask
    match name, arguments:
        case "start", (is_patient,):
            channels.append(
                Channel(
                    player.dial,
                    manifest=player.manifest,
                    session=SESSION,
                    find_resume_point=recorder.find_resume_point,
                    backoff=Backoff(first=0.0, longest=0.0),
                    patient=is_patient,
                    in_background=player.in_background,
                )
            )
            return [["greeted"]]
        case "wait", ():
            key, _ = channels[0].receive_wires()
            return [["replied", key.phase, key.step, key.micro_batch]]
        case "send", (phase, step, number):
            channels[0].send_wires(TaskKey(SESSION, phase, step, number), {}, 0, 0.1)
        case "end", (phase, step, number):
            channels[0].end(TaskKey(SESSION, phase, step, number))
        case "step", (step,):
            recorder.step = step
        case "widen", (in_flight,):
            before = player.dials
            channels[0].widen(in_flight)
            return [["greeted"]] if player.dials > before else []
        case "return_to_step", ():
            channels[0].return_to_step()
            return [["greeted"]]
        case "save", (step, publish, keep):
            return [["save answered", channels[0].save(step, publish=publish, keep=keep)]]
        case "close", (for_good,):
            channels[0].close(for_good=for_good)
    return []
