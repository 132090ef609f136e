"""What the wire costs: a split step that computes next to nothing, against a raw socket's echo.

A batch of 32 rows is cut behind its first layer, so that SIZE MiB travel to the server and as many
back, over loopback, through the same client and server as any step's.  What the same step takes
unsplit is subtracted: ``(split - unsplit) / raw`` is how many times a bare socket's time the wire
takes, by the medians of one run.  The raw echo sends the same bytes with ``sendall`` and receives
them with ``recv_into`` into memory that is there; the server is then idle.

Blocks of steps, unsplit steps and echoes alternate, so that a drifting machine strikes all alike,
and what a step leaves to be done afterwards falls to the next.  On a machine that does other work,
too, look at the quietest tenth, and at the processor time of all parties together.

Exit code 1 if a ratio of medians exceeds its bound (4 MiB: 4, 64 MiB: 2), or if the bytes of a
step, counted by the system with all frames and headers, exceed 1.002 times those of its tensors.

    python benchmarks/wire_step.py [--sizes 4 64] [--rounds 8]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from resnets import start_server

from splitonnx import SGD, Bundle, cut
from splitonnx.runtime.channels.websockets import WebSocketTransport, connect
from splitonnx.runtime.client.clients import Client

ROWS = 32
BOUNDS = {4: 4.0, 64: 2.0}
"""By the size in MiB: the largest ratio of medians."""
MOST_BYTES = 1.002
"""The largest ratio of a step's bytes to its tensors'."""
_TRAFFIC = struct.Struct("=120xQQ")
"""Of Linux's tcp_info: the bytes that were acknowledged, and those that were received."""


@dataclass(kw_only=True)
class Timing:
    """The seconds of each call, and the processor's for all of them."""

    seconds: list[float] = field(default_factory=list)
    busy: float = 0.0

    def at(self, percent: float) -> float:
        """Return a percentile in milliseconds."""
        return float(np.percentile(self.seconds, percent)) * 1000

    @property
    def processor(self) -> float:
        """Return the milliseconds of processor time of one call."""
        return self.busy / len(self.seconds) * 1000


def build(width: int) -> onnx.ModelProto:
    """Two layers that scale each column, of which the second is the server's, and a mean."""
    ones = [numpy_helper.from_array(np.ones(width, np.float32), name) for name in ("w0", "w1")]
    nodes = [
        helper.make_node("Mul", ["x", "w0"], ["scaled"]),
        helper.make_node("Mul", ["scaled", "w1"], ["again"]),
        helper.make_node("ReduceMean", ["again"], ["y"], axes=[1], keepdims=1),
    ]
    graph = helper.make_graph(
        nodes,
        "wire",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])],
        ones,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def echo(size: int, pipe: Connection) -> None:
    """Send back every ``size`` bytes of one connection."""
    memory = memoryview(bytearray(size))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        connection, _ = listener.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while receive(connection, memory):
            connection.sendall(memory)


def receive(connection: socket.socket, memory: memoryview) -> bool:
    """Fill ``memory``; return ``False`` if the connection ends before."""
    filled = 0
    while filled < len(memory):
        read = connection.recv_into(memory[filled:])
        if not read:
            return False
        filled += read
    return True


@contextmanager
def echoing(content: memoryview) -> Iterator[tuple[int, Callable[[], None]]]:
    """Yield another process's number, and a function that sends the content there and back."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=echo, args=(len(content), there), daemon=True)
    process.start()
    memory = memoryview(bytearray(len(content)))
    with socket.create_connection(("127.0.0.1", here.recv())) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def send_and_receive() -> None:
            sending = threading.Thread(target=connection.sendall, args=(content,))
            sending.start()
            receive(connection, memory)
            sending.join()

        assert process.pid is not None
        yield process.pid, send_and_receive
    process.join()


def count_bytes(transport: WebSocketTransport) -> int:
    """Return how many bytes a connection has carried both ways, without headers outside Linux."""
    if sys.platform != "linux":
        return transport.bytes_sent + transport.bytes_received
    connection = transport._socket.socket
    known = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TRAFFIC.size)
    return sum(_TRAFFIC.unpack(known))


def read_busy(*others: int) -> float:
    """Read the processor time of this process and others, in seconds; 0 outside Linux."""
    if sys.platform != "linux":
        return 0.0
    fields = [Path(f"/proc/{n}/stat").read_text().rpartition(")")[2].split() for n in others]
    ticks = sum(int(user) + int(system) for user, system in (field[11:13] for field in fields))
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure(mib: int, rounds: int) -> tuple[dict[str, Timing], float]:
    """Time ``raw``, ``split`` and ``unsplit`` in turn; also return a step's bytes per tensors'."""
    width = mib * (1 << 20) // (ROWS * 4)
    x = np.random.default_rng(0).standard_normal((ROWS, width), np.float32)
    batch = {"x": x, "labels": np.zeros((ROWS, 1), np.float32)}
    cutting: Callable[..., Bundle] = partial(cut, build(width), loss="mse", optimizer=SGD(lr=1e-6))
    bundle = cutting(at="scaled", send_inputs=["x"], send_labels=True)
    found = {name: Timing() for name in ("raw", "split", "unsplit")}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bundle.save(Path(folder, "bundle"))
        other, send_and_receive = stack.enter_context(echoing(x.data.cast("B")))
        starting = start_server(Path(folder, "bundle/server"), "--threads", "1")
        server, url = stack.enter_context(starting)
        transport = connect(url)
        split = stack.enter_context(Client(bundle.client, transport, threads=1))
        unsplit = stack.enter_context(Client(cutting(at=None).client, threads=1))
        calls: tuple[Callable[[], object], ...] = (
            send_and_receive,
            partial(split.step, batch),
            partial(unsplit.step, batch),
        )
        steps, before = 0, count_bytes(transport)
        for number in range(rounds + 1):
            for timing, call in zip(found.values(), calls, strict=True):
                times, begun = [], read_busy(other, server)
                for _ in range(max(2, min(10, 64 // mib))):
                    start = time.perf_counter()
                    call()
                    times.append(time.perf_counter() - start)
                if number:  # the first round warms up
                    timing.seconds += times
                    timing.busy += read_busy(other, server) - begun
                steps += len(times) if call is calls[1] else 0
        carried = count_bytes(transport) - before
    return found, carried / steps / (2 * x.nbytes + batch["labels"].nbytes)


def report(mib: int, found: dict[str, Timing], share: float) -> bool:
    """Print the figures; return whether they are within their bounds."""
    raw, split, unsplit = found.values()

    def compare(read: Callable[[Timing], float]) -> float:
        return (read(split) - read(unsplit)) / read(raw)

    ratio = compare(lambda timing: timing.at(50))
    quiet = compare(lambda timing: timing.at(10))
    processor = compare(lambda timing: timing.processor) if raw.busy else float("nan")
    for name, timing in found.items():
        print(
            f"{mib:3} MiB {name:8}{timing.at(50):8.1f} ms  ({timing.at(10):.1f} to "
            f"{timing.at(90):.1f}, 10 % to 90 %), {timing.processor:.1f} ms of processor"
        )
    print(
        f"{mib:3} MiB wire / raw  {ratio:.2f}  ({quiet:.2f} in the quietest tenth, "
        f"{processor:.2f} of processor); {share:.5f} bytes per byte of tensors"
    )
    return ratio <= BOUNDS.get(mib, float("inf")) and share <= MOST_BYTES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sizes", type=int, nargs="+", default=sorted(BOUNDS), help="in MiB")
    parser.add_argument("--rounds", type=int, default=8, help="rounds of blocks that count")
    options = parser.parse_args()
    results = [report(mib, *measure(mib, options.rounds)) for mib in options.sizes]
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
