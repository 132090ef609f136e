"""Play scripts to a client's channel on an event loop, and record what it does and tells."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from splitonnx.codecs import Chunk
from splitonnx.errors import SplitonnxError
from splitonnx.messages import TaskKey
from splitonnx.runtime.channels.asynchronous.channels import AsyncChannel
from splitonnx.runtime.channels.asynchronous.threads import WorkThread
from splitonnx.runtime.channels.retries import Backoff
from tests.support.exchange_players import (
    NothingHappens,
    Recorder,
    ScriptedConnection,
    ScriptPlayer,
)
from tests.support.exchange_scripts import SESSION, Entry


class AsyncScriptedConnection:
    """A connection on which happens what a script says; see :class:`transports.AsyncTransport`."""

    def __init__(self, connection: ScriptedConnection) -> None:
        self._connection = connection

    async def send(self, chunks: Sequence[Chunk]) -> None:
        await asyncio.sleep(0)  # others may run first, as on a real connection
        self._connection.send(chunks)

    async def receive(self) -> bytes:
        return self._connection.receive()

    async def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


def play_async_channel(name: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Play a script to a channel on a loop; return what was transmitted, and what it told."""
    return asyncio.run(_play(name))


async def _play(name: str) -> tuple[list[dict[str, Any]], list[Any]]:
    player, recorder, thread = ScriptPlayer(name), Recorder(), WorkThread()
    told: list[Any] = []

    async def dial() -> AsyncScriptedConnection:
        return AsyncScriptedConnection(player.dial())

    channel = AsyncChannel(
        dial,
        thread,
        manifest=player.manifest,
        session=SESSION,
        find_resume_point=recorder.find_resume_point,
        backoff=Backoff(first=0.0, longest=0.0),
    )
    while (ask := player.next_ask()) is not None:
        with suppress(NothingHappens):
            try:
                told += await _ask(ask, player, recorder, channel)
            except SplitonnxError as error:
                told.append(["failed", type(error).__name__])
    await channel.close(for_good=False)  # after all was sent
    thread.close()
    return player.transmitted, told


async def _ask(
    ask: Entry, player: ScriptPlayer, recorder: Recorder, channel: AsyncChannel
) -> list[Any]:
    name, *arguments = ask
    match name, arguments:
        case "start", (is_patient,):
            await channel.open(is_patient=is_patient)
            return [["greeted"]]
        case "wait", ():
            key, _ = await channel.receive_wires()
            return [["replied", key.phase, key.step, key.micro_batch]]
        case "send", (phase, step, number):
            await channel.send_wires(TaskKey(SESSION, phase, step, number), {}, 0, 0.1)
        case "end", (phase, step, number):
            channel.end(TaskKey(SESSION, phase, step, number))
        case "step", (step,):
            recorder.step = step
        case "widen", (in_flight,):
            before = player.dials
            await channel.widen(in_flight)
            return [["greeted"]] if player.dials > before else []
        case "return_to_step", ():
            await channel.return_to_step()
            return [["greeted"]]
        case "save", (step, publish, keep):
            return [["save answered", await channel.save(step, publish=publish, keep=keep)]]
        case "close", (for_good,):
            await channel.close(for_good=for_good)
    return []
