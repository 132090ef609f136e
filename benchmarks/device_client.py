"""One client for ``device_cost.py``: takes a step for each line that it reads, and prints its cost.

A process of its own that imports what a device does: the runtime, and nothing that cuts.  It
answers each line, and the end of its input, with a line of JSON: for a step the seconds of the
whole step, ``wall``; of it those that were not spent waiting for the server, ``awake``; and of
processor time of all threads, ``own``.  At the end the ``peak`` of its memory in bytes.  For Linux.
``runtime/js/scripts/device.ts`` is the same in JavaScript.

    python benchmarks/device_client.py CLIENT_FOLDER URL BATCH SIDE
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from splitonnx.codecs import Chunk
from splitonnx.runtime.channels.websockets import connect
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.wire.transports import Transport


class PatientTransport:
    """A connection that counts the seconds in which it waited for messages."""

    def __init__(self, inner: Transport) -> None:
        self.bytes_sent = self.bytes_received = 0
        self.waited = 0.0
        self._inner = inner

    def send(self, chunks: Sequence[Chunk]) -> None:
        self._inner.send(chunks)
        self.bytes_sent = self._inner.bytes_sent

    def receive(self) -> Chunk | bytearray:
        start = time.perf_counter()
        message = self._inner.receive()
        self.waited += time.perf_counter() - start
        self.bytes_received = self._inner.bytes_received
        return message

    def close(self) -> None:
        self._inner.close()


def read_peak() -> int:
    """Read the most memory that this process had resident, in bytes.

    Not ``ru_maxrss``: that begins with the peak of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure_step(
    client: Client, transport: PatientTransport, batch: dict[str, np.ndarray]
) -> dict[str, float]:
    traffic = transport.bytes_sent + transport.bytes_received
    waited, start, begun = transport.waited, time.perf_counter(), time.process_time()
    client.step(batch)
    own, wall = time.process_time() - begun, time.perf_counter() - start
    return {
        "own": own,
        "wall": wall,
        "awake": wall - (transport.waited - waited),
        "wire": transport.bytes_sent + transport.bytes_received - traffic,
    }


def main() -> None:
    folder, url = sys.argv[1:3]
    batch_size, side = map(int, sys.argv[3:])
    random = np.random.default_rng(1)
    batch: dict[str, np.ndarray] = {
        "x": random.standard_normal((batch_size, 3, side, side), np.float32),
        "labels": random.integers(0, 10, batch_size),
    }
    transport = PatientTransport(connect(url))
    # One thread: with more, how long they wait for each other depends on what else runs.
    with Client(folder, transport, threads=1) as client:
        for _ in sys.stdin:
            print(json.dumps(measure_step(client, transport, batch)), flush=True)
    print(json.dumps({"peak": read_peak()}))


if __name__ == "__main__":
    main()
