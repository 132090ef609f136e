"""One client for ``device_cost.py`` and ``client_memory.py``: takes a step for each line it reads.

A process of its own that imports what a device does: the runtime, and nothing that cuts.  It
answers each line, and the end of its input, with a line of JSON: for a step the seconds of the
whole step, ``wall``; of it those that were not spent waiting for the server, ``awake``; and of
processor time of all threads, ``own``.  At the end the ``peak`` of its memory in bytes, and the
``base``, what it had resident before the first step, when all was loaded, with the pages of
libraries that were first touched later.  For Linux.
``runtime/js/scripts/device.ts`` is the same in JavaScript, without ``base`` and ``ACCUMULATE``.

    python benchmarks/device_client.py CLIENT_FOLDER URL BATCH SIDE [ACCUMULATE]
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from splitonnx.codecs import Chunk
from splitonnx.manifests import PartyManifest
from splitonnx.names import TRAIN
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


def read_resident(line: str) -> int:
    """Read how much memory this process has resident, ``VmRSS``, or had at its most, ``VmHWM``.

    ``RssFile`` is what it has resident of files that are mapped, such as libraries.
    Not ``ru_maxrss``: that begins with the peak of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) * 1024


def draw_batch(manifest: PartyManifest, size: int) -> dict[str, np.ndarray]:
    """Draw random data for a step."""
    random = np.random.default_rng(1)
    batch: dict[str, np.ndarray] = {}
    for spec in manifest.phase(TRAIN).data:
        dims = [dim if isinstance(dim, int) else size for dim in spec.shape]
        is_float = spec.dtype == "F32"
        batch[spec.name] = (
            random.standard_normal(dims, np.float32) if is_float else random.integers(0, 10, dims)
        )
    return batch


def measure_step(
    client: Client, transport: PatientTransport, batch: dict[str, np.ndarray], accumulate: int
) -> dict[str, float]:
    traffic = transport.bytes_sent + transport.bytes_received
    waited, start, begun = transport.waited, time.perf_counter(), time.process_time()
    client.step(batch, accumulate=accumulate)
    own, wall = time.process_time() - begun, time.perf_counter() - start
    return {
        "own": own,
        "wall": wall,
        "awake": wall - (transport.waited - waited),
        "wire": transport.bytes_sent + transport.bytes_received - traffic,
    }


def main() -> None:
    folder, url = sys.argv[1:3]
    batch_size, _, accumulate = map(int, [*sys.argv[3:], "1"][:3])
    transport = PatientTransport(connect(url))
    # One thread: with more, how long they wait for each other depends on what else runs.
    with Client(folder, transport, threads=1) as client:
        batch = draw_batch(client.manifest, batch_size)
        client._runner.prepare_training(accumulate)  # loads what the first step would load
        base = read_resident("VmRSS") - read_resident("RssFile")
        for _ in sys.stdin:
            print(json.dumps(measure_step(client, transport, batch, accumulate)), flush=True)
    base += read_resident("RssFile")
    print(json.dumps({"peak": read_resident("VmHWM"), "base": base}))


if __name__ == "__main__":
    main()
