"""Chaos in short, and what makes it: the drawn faults, the proxy, the keeper."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path

import pytest

from tests.chaos.faults import DECK, GREETING, HANDSHAKE, Direction, Fault, Kind, draw_faults
from tests.chaos.proxies import Proxy
from tests.chaos.supervisors import Collapse, Keeper
from tests.conftest import ROOT

UP, DOWN = Direction
REACH = {UP: 40_000, DOWN: 20_000}
FOREVER = 1 << 40
"""An offset that no connection reaches."""


# --- faults ---------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_faults() -> None:
    first, second, other = (list(islice(draw_faults(s, REACH), 50)) for s in ("1", "1", "2"))
    assert first == second != other


def test_faults_are_of_every_kind_and_lie_everywhere() -> None:
    faults = list(islice(draw_faults("0", REACH), 3000))
    kinds = Counter(fault.kind for fault in faults[: sum(DECK.values())])
    assert kinds == DECK
    for direction in Direction:
        offsets = [fault.offset for fault in faults if fault.direction is direction]
        assert sum(offset <= HANDSHAKE for offset in offsets) > 100
        assert sum(HANDSHAKE < offset <= GREETING for offset in offsets) > 100
        assert GREETING + 0.95 * REACH[direction] < max(offsets) <= GREETING + REACH[direction]


# --- the proxy ------------------------------------------------------------------------------


class Echo:
    """A server that sends back what comes, and remembers what came in each connection."""

    def __init__(self) -> None:
        self.received: list[bytearray] = []
        self.ended: list[asyncio.Future[str]] = []

    async def attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = bytearray()
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.received.append(received)
        self.ended.append(ended)
        try:
            while content := await reader.read(1 << 16):
                received += content
                writer.write(content)
                await writer.drain()
            ended.set_result("fin")
        except OSError:
            ended.set_result("reset")
        finally:
            writer.close()


@asynccontextmanager
async def echoing(*faults: Fault) -> AsyncIterator[tuple[Echo, Proxy, list[Kind]]]:
    echo, strikes = Echo(), list[Kind]()
    server = await asyncio.start_server(echo.attend, "127.0.0.1", 0)
    proxy = Proxy(iter(faults), strikes.append)
    proxy.upstream = server.sockets[0].getsockname()[1]
    async with proxy.listening():
        yield echo, proxy, strikes
    server.close()


async def exchange(proxy: Proxy, content: bytes) -> tuple[bytes, str]:
    """Send, and read until ``content`` is back or the connection ends; tell how it went."""
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    received = bytearray()
    try:
        writer.write(content)
        while len(received) < len(content):
            piece = await reader.read(1 << 16)
            if not piece:
                return bytes(received), "fin"
            received += piece
        return bytes(received), "whole"
    except OSError:
        return bytes(received), "reset"
    finally:
        writer.transport.abort()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def within_time() -> None:
        await asyncio.wait_for(test(), 20)

    asyncio.run(within_time())


def fault(kind: Kind, direction: Direction = UP, offset: int = 1000, after: int = 0) -> Fault:
    return Fault(kind=kind, direction=direction, offset=offset, after=after)


CONTENT = bytes(range(256)) * 4000


def test_a_connection_passes_whole_while_its_fault_waits() -> None:
    async def test() -> None:
        async with echoing(fault(Kind.RESET, offset=FOREVER)) as (echo, proxy, strikes):
            assert await exchange(proxy, CONTENT) == (CONTENT, "whole")
            assert bytes(echo.received[0]) == CONTENT
            assert (proxy.cuts, strikes) == (0, [])

    run(test)


@pytest.mark.parametrize("offset", [0, 1, 1000, 70_000])
@pytest.mark.parametrize("kind", [Kind.FIN, Kind.RESET, Kind.SILENCE, Kind.ORPHAN])
@pytest.mark.parametrize("direction", [UP, DOWN])
def test_a_cut_lies_at_its_byte(kind: Kind, direction: Direction, offset: int) -> None:
    async def test() -> None:
        async with echoing(fault(kind, direction, offset)) as (echo, proxy, _):
            received, end = await exchange(proxy, CONTENT)
            assert end == ("fin" if kind is Kind.FIN else "reset")
            assert CONTENT.startswith(received)
            assert len(received) <= offset
            if direction is UP and kind is not Kind.ORPHAN:
                assert await echo.ended[0] == end
                assert CONTENT[:offset].startswith(echo.received[0])
                assert kind is not Kind.FIN or len(echo.received[0]) == offset
            assert proxy.cuts == 1
            assert proxy.struck == {kind: 1}

    run(test)


def test_what_an_orphan_sent_arrives_after_the_next_connection_has_spoken() -> None:
    async def test() -> None:
        waiting = fault(Kind.RESET, offset=FOREVER)
        async with echoing(fault(Kind.ORPHAN, offset=10, after=50), waiting) as (echo, proxy, _):
            assert (await exchange(proxy, CONTENT[:30]))[1] == "reset"
            assert bytes(echo.received[0]) == CONTENT[:10]
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(CONTENT[:40])
            await reader.readexactly(40)
            assert not echo.ended[0].done()
            writer.write(CONTENT[:40])
            await reader.readexactly(40)
            assert await echo.ended[0] == "fin"
            assert bytes(echo.received[0]) == CONTENT[:30]
            writer.close()

    run(test)


def test_a_kill_is_told_and_the_connection_goes_on() -> None:
    async def test() -> None:
        async with echoing(fault(Kind.KILL_SERVER, offset=500)) as (_, proxy, strikes):
            assert await exchange(proxy, CONTENT) == (CONTENT, "whole")
            assert (strikes, proxy.cuts) == ([Kind.KILL_SERVER], 0)

    run(test)


def test_after_a_stop_some_bytes_still_come_down_before_the_reset() -> None:
    async def test() -> None:
        async with echoing(fault(Kind.STOP_SERVER, offset=100, after=7)) as (_, proxy, strikes):
            received, end = await exchange(proxy, CONTENT[:100])
            assert (received, end) == (CONTENT[:7], "reset")
            assert (strikes, proxy.cuts) == ([Kind.STOP_SERVER], 0)

    run(test)


def test_a_connection_without_a_server_spends_no_fault() -> None:
    async def test() -> None:
        async with echoing(fault(Kind.RESET, offset=0)) as (_, proxy, _):
            port, proxy.upstream = proxy.upstream, None
            assert (await exchange(proxy, b"x"))[1] in ("fin", "reset")
            assert proxy.cuts == 0
            proxy.upstream = port
            assert (await exchange(proxy, b"x"))[1] == "reset"
            assert proxy.cuts == 1

    run(test)


# --- the keeper -----------------------------------------------------------------------------


def keep(folder: Path, script: str, act: Callable[[Keeper, str], None]) -> Keeper:
    """Keep a Python script until it succeeds; ``act`` on each line that it prints."""

    def hear(line: str) -> None:
        act(keeper, line.strip())

    keeper = Keeper(command(script), folder / "log", hear=hear, seed="0")
    asyncio.run(keeper.keep())
    return keeper


def command(script: str) -> Sequence[str]:
    return [sys.executable, "-c", script]


def count_starts(folder: Path, limit: int) -> str:
    """A script that tells how often it was started, and succeeds at the last time."""
    return f"""
import signal, sys
with open({str(folder / "starts")!r}, "a") as file:
    file.write("x")
    starts = file.tell()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print(starts, flush=True)
while starts < {limit}:
    signal.pause()
"""


def test_a_killed_process_is_started_again_until_it_succeeds(tmp_path: Path) -> None:
    keeper = keep(
        tmp_path,
        count_starts(tmp_path, 4),
        lambda keeper, line: keeper.kill() if int(line) < 4 else None,
    )
    starts = len((tmp_path / "starts").read_text())
    assert keeper.kills + keeper.stumbles + 1 >= starts >= 4


def test_a_stopped_process_is_started_again(tmp_path: Path) -> None:
    keeper = keep(
        tmp_path,
        count_starts(tmp_path, 3),
        lambda keeper, line: keeper.stop() if int(line) < 3 else None,
    )
    assert (keeper.kills, keeper.stops) == (0, 2)


def test_a_process_that_fails_by_itself_is_no_chaos_but_a_finding(tmp_path: Path) -> None:
    with pytest.raises(Collapse, match=r"code 3\n.*why it failed"):
        keep(tmp_path, "print('why it failed'); raise SystemExit(3)", lambda *_: None)


def test_a_process_is_asked_to_leave_and_has_to(tmp_path: Path) -> None:
    async def finish(script: str) -> None:
        ready = asyncio.Event()
        keeper = Keeper(command(script), tmp_path / "log", hear=lambda _: ready.set(), seed="0")
        keeping = asyncio.ensure_future(keeper.keep())
        await ready.wait()
        try:
            await keeper.finish()
        finally:
            await keeping

    asyncio.run(finish(count_starts(tmp_path, 9)))
    with pytest.raises(Collapse, match="left with code 4"):
        asyncio.run(finish(count_starts(tmp_path, 9).replace("exit(0)", "exit(4)")))


# --- chaos ----------------------------------------------------------------------------------


def run_chaos(folder: Path, *options: str) -> None:
    command = [sys.executable, "-m", "tests.chaos", *options, "--folder", str(folder / "chaos")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "good, the weights are those" in done.stdout


@pytest.mark.early
@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a signal of POSIX")
def test_training_through_cuts_and_kills_ends_at_the_same_bits(tmp_path: Path) -> None:
    run_chaos(tmp_path, "--seed", "5", "--cuts", "50", "--kills", "2")


@pytest.mark.early
@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a signal of POSIX")
def test_clients_that_train_one_model_through_cuts_and_kills_end_at_the_same_bits(
    tmp_path: Path,
) -> None:
    """The seed is one whose first faults are kills of each side."""
    together = ("--clients", "3", "--policy", "splitfed-v1")
    run_chaos(tmp_path, *together, "--seed", "79", "--cuts", "20", "--kills", "2")
