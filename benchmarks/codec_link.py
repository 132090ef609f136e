"""What codecs are worth over a slow link: a ResNet-18's split step at 20 Mbit/s and 40 ms.

The network has width 16, for images of 32x32, and is cut behind its first stage, vanilla, batch 32.
Client and server are two processes with one thread each.  Between them a proxy passes every byte on
as a link would: each direction carries ``--rate`` Mbit/s, and a byte arrives half the round trip
``--delay`` after it was sent.  Codecs take turns, so that a drifting machine strikes all alike;
figures are medians over ``--steps`` steps of each.

The last column is a step of ``--micro-batches``, of which ``--in-flight`` are under way at a time.

Exit code 1 if a step with ``int8`` is less than 3 times faster than with ``fp32``, or not faster
still with micro-batches.

    python benchmarks/codec_link.py [--rate 20] [--delay 40] [--steps 8] [--codecs fp32 int8 ...]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import numpy as np
from resnets import build_resnet18, serve

from splitonnx import SGD, Client, cut
from splitonnx.disclosures import list_sent
from splitonnx.names import CLIENT, SERVER, TRAIN

BATCH, WIDTH, CUT = 32, 16, "stage0"
CODECS = ("fp32", "fp16", "int8", "int4", "topk=0.1")
LEAST_RATIO = 3.0
PIECE = 1 << 14
"""Bytes that are passed on together."""


@dataclass(frozen=True, kw_only=True)
class SlowNetwork:
    """A link's capacity in bytes per second, each way, and the seconds that a byte takes."""

    rate: float
    latency: float

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on bytes in one direction, until it ends."""
        arriving: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivering = asyncio.create_task(_deliver(arriving, writer))
        free = 0.0  # when the link has sent what it was given
        while piece := await reader.read(PIECE):
            free = max(free, time.monotonic()) + len(piece) / self.rate
            arriving.put_nowait((free + self.latency, piece))
            await asyncio.sleep(max(0.0, free - time.monotonic()))
        arriving.put_nowait((free + self.latency, b""))
        await delivering


async def _deliver(
    arriving: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
) -> None:
    """Write what arrives when it is due."""
    while True:
        due, piece = await arriving.get()
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        if not piece:
            writer.close()
            return
        writer.write(piece)
        await writer.drain()


@contextmanager
def shape(url: str, network: SlowNetwork) -> Iterator[str]:
    """Yield the address of a proxy to a server, which carries bytes as the link does."""
    loop, ready = asyncio.new_event_loop(), threading.Event()
    address = urlsplit(url)
    port = 0

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(address.hostname, address.port)
        with suppress(asyncio.CancelledError):  # the proxy ends
            await asyncio.gather(network.carry(reader, back), network.carry(there, writer))

    async def listen() -> None:
        nonlocal port
        server = await asyncio.start_server(pass_on, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        ready.set()

    def run() -> None:
        loop.create_task(listen())
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.1))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait()
    yield f"ws://127.0.0.1:{port}"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def main() -> int:
    """Measure every codec, print the table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=20.0, help="Mbit/s, each way")
    parser.add_argument("--delay", type=float, default=40.0, help="ms, there and back")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--in-flight", type=int, default=4)
    parser.add_argument("--codecs", nargs="+", default=list(CODECS))
    given = parser.parse_args()
    network = SlowNetwork(rate=given.rate * 1e6 / 8, latency=given.delay / 2e3)
    random = np.random.default_rng(0)
    data: dict[str, np.ndarray] = {
        "x": random.standard_normal((BATCH, 3, 32, 32), np.float32),
        "labels": random.integers(0, 10, BATCH),
    }
    seconds: dict[str, list[float]] = {codec: [] for codec in given.codecs}
    overlapped: dict[str, list[float]] = {codec: [] for codec in given.codecs}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        clients = {}
        for number, codec in enumerate(given.codecs):
            place = Path(folder, str(number))
            bundle = cut(
                build_resnet18(WIDTH),
                at=CUT,
                send_labels=True,
                optimizer=SGD(lr=1e-3),
                check=False,
                wire=codec,
            )
            bundle.save(place)
            sent = [
                list_sent(bundle.client.manifest, TRAIN, s, BATCH).bytes for s in (CLIENT, SERVER)
            ]
            sizes[codec] = sum(size or 0 for size in sent)
            url = stack.enter_context(serve(place / "server", threads=1))
            shaped = stack.enter_context(shape(url, network))
            clients[codec] = stack.enter_context(Client(bundle.client, shaped, threads=1))
        for turn in range(given.steps + 1):
            for codec, client in clients.items():
                start = time.perf_counter()
                client.step(data)
                middle = time.perf_counter()
                client.step(data, micro_batches=given.micro_batches, in_flight=given.in_flight)
                if turn:  # the first warms up
                    seconds[codec].append(middle - start)
                    overlapped[codec].append(time.perf_counter() - middle)
    plain = median(seconds["fp32"]) if "fp32" in seconds else float("nan")
    print(
        f"| codec | bytes a step | s a step | faster | with {given.micro_batches} micro-batches |"
    )
    print("| --- | ---: | ---: | ---: | ---: |")
    for codec, times in seconds.items():
        taken, less = median(times), median(overlapped[codec])
        print(f"| `{codec}` | {sizes[codec]:,} | {taken:.2f} | {plain / taken:.2f} | {less:.2f} |")
    if "int8" not in seconds:
        return 0
    is_faster = median(overlapped["int8"]) < median(seconds["int8"])
    return int(plain / median(seconds["int8"]) < LEAST_RATIO or not is_faster)


if __name__ == "__main__":
    sys.exit(main())
