"""One client for ``device_cost.py``: trains some steps and prints what they cost its process.

A process of its own that imports what a device does: the runtime, and nothing that cuts.
The last line of its output is JSON: ``own`` and ``idle_free`` are lists of seconds a step, of
processor time of all threads and of the wall time that was not spent waiting for the server;
``wall`` the whole steps'; ``peak`` is in bytes, ``wire`` in bytes a step.  For Linux.

    python benchmarks/device_client.py CLIENT_FOLDER URL BATCH SIDE WARM_UP STEPS
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from splitonnx.codecs import Chunk
from splitonnx.runtime.clients import Client
from splitonnx.runtime.sockets import connect
from splitonnx.runtime.transports import Transport


class PatientTransport:
    """A connection that counts the seconds in which it waited for messages."""

    def __init__(self, inner: Transport) -> None:
        self.bytes_sent = self.bytes_received = 0
        self.waited = 0.0
        self._inner = inner

    def send(self, chunks: Sequence[Chunk]) -> None:
        self._inner.send(chunks)
        self.bytes_sent = self._inner.bytes_sent

    def receive(self) -> Chunk:
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


def main() -> None:
    folder, url = sys.argv[1:3]
    batch_size, side, warm_up, steps = map(int, sys.argv[3:])
    random = np.random.default_rng(1)
    batch: dict[str, np.ndarray] = {
        "x": random.standard_normal((batch_size, 3, side, side), np.float32),
        "labels": random.integers(0, 10, batch_size),
    }
    transport = PatientTransport(connect(url))
    own, wall, idle_free = [], [], []
    # One thread: with more, how long they wait for each other depends on what else runs.
    with Client(folder, transport, threads=1) as client:
        for _ in range(warm_up):
            client.step(batch)
        traffic = transport.bytes_sent + transport.bytes_received
        for _ in range(steps):
            waited, start, begun = transport.waited, time.perf_counter(), time.process_time()
            client.step(batch)
            own.append(time.process_time() - begun)
            wall.append(time.perf_counter() - start)
            idle_free.append(wall[-1] - (transport.waited - waited))
        wire = (transport.bytes_sent + transport.bytes_received - traffic) / steps
    figures = {"own": own, "wall": wall, "idle_free": idle_free, "wire": wire, "peak": read_peak()}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
