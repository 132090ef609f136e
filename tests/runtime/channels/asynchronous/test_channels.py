"""A client's channel on an event loop: it does what the exchange wants, as the waiting one does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest

from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost
from splitonnx.messages import TaskKey, encode_message
from splitonnx.runtime.channels.asynchronous import channels, queued_sending
from splitonnx.runtime.channels.asynchronous.channels import AsyncChannel
from splitonnx.runtime.channels.asynchronous.threads import WorkThread
from splitonnx.runtime.channels.retries import Backoff
from tests.conftest import ROOT
from tests.support.async_players import AsyncScriptedConnection, play_async_channel
from tests.support.exchange_players import Recorder, make_answer, make_manifest
from tests.support.exchange_scripts import SCRIPTS, SESSION

VECTORS = json.loads((ROOT / "tests" / "vectors" / "exchanges.json").read_text())


@pytest.mark.parametrize("are_large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_shell_on_an_event_loop_follows_the_same_scripts(
    name: str, are_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if are_large:  # as if all messages were: they are checked and decoded in the thread
        monkeypatch.setattr(channels, "FRAGMENT", -1)
    transmitted, told = play_async_channel(name)
    follows = [one for entry in VECTORS[name] for one in entry["follows"]]
    assert transmitted == [one[1] for one in follows if one[0] == "transmit"]
    assert told == [one for one in follows if one[0] not in ("transmit", "connect", "hang up")]


def test_a_server_that_stays_away_is_given_up_and_the_loop_is_free_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, waits = 0.0, 0

    async def sleep(seconds: float) -> None:
        nonlocal now, waits
        now, waits = now + seconds, waits + 1

    async def dial() -> AsyncScriptedConnection:
        raise ConnectionLost("the server", "it is away")

    async def wait() -> None:
        channel = AsyncChannel(
            dial,
            WorkThread(),
            manifest=make_manifest(),
            session=SESSION,
            find_resume_point=Recorder().find_resume_point,
            backoff=Backoff(first=1.0, longest=8.0, give_up_after=30.0),
        )
        with monkeypatch.context() as patched:
            patched.setattr(f"{channels.__name__}.asyncio.sleep", sleep)
            patched.setattr(f"{channels.__name__}.time.monotonic", lambda: now)
            with pytest.raises(ConnectionLost, match="it is away"):
                await channel.open(is_patient=True)
        await channel.close()
        with pytest.raises(ConnectionLost, match="connection is closed"):
            await channel.send_wires(TaskKey(SESSION, "train", 0, 0), {}, 0, 0.1)

    asyncio.run(wait())
    assert now == pytest.approx(30.0)
    assert waits > 4


class Deaf(AsyncScriptedConnection):
    """A connection that sends a greeting, hears its answer, and then sends nothing any more."""

    def __init__(self) -> None:
        self.sent = 0
        self.is_aborted = False

    async def send(self, chunks: Sequence[Chunk]) -> None:
        self.sent += 1
        if self.sent > 1:
            await asyncio.Event().wait()

    async def receive(self) -> bytes:
        return b"".join(encode_message(make_answer(make_manifest(), "welcome", [{}])))

    def abort(self) -> None:
        self.is_aborted = True


def test_closing_ends_in_time_though_nothing_can_be_sent_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channels, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(queued_sending, "MOST_WAITING", 1)
    connection = Deaf()

    async def dial() -> Deaf:
        return connection

    async def close() -> None:
        channel = AsyncChannel(
            dial,
            WorkThread(),
            manifest=make_manifest(),
            session=SESSION,
            find_resume_point=Recorder().find_resume_point,
            backoff=Backoff(),
        )
        await channel.open()
        await channel.send_wires(TaskKey(SESSION, "train", 0, 0), {}, 0, 0.1)
        await channel.close()
        assert connection.is_aborted
        await asyncio.sleep(0)  # the task that sends learns that it was cancelled

    asyncio.run(close())
