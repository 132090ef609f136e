"""Every dimension of every wire told wrongly: ``python -m tests.support.wire_shapes MODEL``.

A task is recorded between an honest client and an honest server.  Then each message is sent once
more with one dimension of one wire changed, to a server that has the honest messages before it and
to a client that has the honest replies before it.  Either may refuse with an error of splitonnx's
own, or do what is right for the message.  A signal ends this process, so tests run it as a child.
With ``--every`` it tries every cut of the zoo's tests, for both targets.
"""

from __future__ import annotations

import json
import struct
import sys
import uuid
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import msgspec
import numpy as np

from splitonnx.bundles import Bundle
from splitonnx.codecs import Chunk
from splitonnx.errors import SplitonnxError
from splitonnx.expressions import UNKNOWN
from splitonnx.messages import Fault, Hello, Tensors, decode_message, encode_message
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import inspect
from splitonnx.runtime.client import clients
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine, LoadedStage
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import MemoryTransport
from splitonnx.runtime.server.dispatchers import Dispatcher
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.wire.protocols import list_wires
from tests.support.zoo import ZOO, Arrays, Entry

BATCH = 3
HUGE = 2**31
Place = tuple[str | Sequence[str], str | tuple[str, ...]]


class _SharedEngine(Engine):
    """Loads a graph once, however many clients and servers run it."""

    _stages: dict[tuple[object, ...], LoadedStage] = {}  # noqa: RUF012

    def __init__(self, threads: int | None = None, **options: Any) -> None:
        super().__init__(1, **options)

    def load(
        self,
        name: str,
        graph: bytes,
        *,
        training: bool = False,
        steady: Collection[str] = (),
        sums: Mapping[str, str] = {},
        early: Collection[str] = (),
    ) -> LoadedStage:
        key = name, graph, training, steady, tuple(sums.items()), early
        if key not in self._stages:
            self._stages[key] = super().load(
                name, graph, training=training, steady=steady, sums=sums, early=early
            )
        return self._stages[key]


ENGINE = _SharedEngine()


@dataclass(frozen=True, kw_only=True)
class Lie:
    """One dimension of one wire, changed; ``size`` is what it becomes."""

    wire: str
    axis: int
    size: int

    def tell(self, message: Tensors, arrays: Arrays) -> bytes:
        """Write the message with the lie in it; more rows than there are repeat the first ones."""
        array = arrays[self.wire]
        if self.size < HUGE:
            resized = _resize(array, [*[None] * self.axis, self.size])
            return b"".join(encode_message(message, {**arrays, self.wire: resized}))
        return _forge(message, arrays, self)


def _forge(message: Tensors, arrays: Arrays, lie: Lie) -> bytes:
    """Write a header that promises more than there is; the other dimensions are empty."""
    array = arrays[lie.wire]
    shape = [lie.size if axis == lie.axis else 0 for axis in range(array.ndim)]
    empty = {**arrays, lie.wire: np.zeros((0,) * array.ndim, array.dtype)}
    content = b"".join(encode_message(message, empty))
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    header[lie.wire]["shape"] = shape
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def list_lies(arrays: Arrays) -> Iterator[Lie]:
    """List what may be told wrongly of a message's dimensions."""
    for wire, array in arrays.items():
        for axis, size in enumerate(array.shape):
            for wrong in sorted({0, 1, size - 1, size + 1, 2 * size, HUGE} - {size}):
                yield Lie(wire=wire, axis=axis, size=wrong)


class _Recorder(MemoryTransport):
    """An honest connection that keeps what was said, and may change one reply."""

    def __init__(self, executor: Executor, lie: Lie | None = None, at: int = 0) -> None:
        super().__init__(Dispatcher(Registry(executor)))
        self.sent: list[bytes] = []
        self.received: list[bytes] = []
        self._lie, self._at = lie, at

    def send(self, chunks: Sequence[Chunk]) -> None:
        self.sent.append(b"".join(chunks))
        super().send(chunks)

    def receive(self) -> bytes:
        content = super().receive()
        self.received.append(content)
        if self._lie is not None and len(self.received) - 1 == self._at:
            message, arrays = decode_message(content)
            assert isinstance(message, Tensors)
            return self._lie.tell(message, arrays)
        return content


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A cut model whose parts are loaded, with the data of one task."""

    bundle: Bundle
    server: Executor
    data: Arrays

    def perform(self, phase: str, transport: _Recorder) -> Arrays:
        """Let a client carry out one task."""
        with Client(self.bundle.client, transport) as client:
            if phase == "train":
                return client.step(self.data)
            names = {spec.name for spec in self.bundle.client.manifest.phase(phase).data}
            return client.predict({n: a for n, a in self.data.items() if n in names})


def try_subject(subject: Subject) -> Counter[str]:
    """Tell all lies to both sides, and count how each ended."""
    ends: Counter[str] = Counter()
    for phase in ("train", "predict"):
        honest = _Recorder(subject.server)
        results = subject.perform(phase, honest)
        ends.update(_lie_to_server(subject, honest))
        ends.update(_lie_to_client(subject, phase, honest, results))
    return ends


def _read(content: bytes) -> tuple[Tensors, Arrays] | None:
    message, arrays = decode_message(content)
    return (message, arrays) if isinstance(message, Tensors) else None


def _lie_to_server(subject: Subject, honest: _Recorder) -> Iterator[str]:
    said = [read for content in honest.sent if (read := _read(content))]
    answers = [content for content in honest.received if _read(content)]
    yield from _lie_throughout(subject.server, said)
    for place, (_, arrays) in enumerate(said):
        for lie in list_lies(arrays):
            yield "server " + _tell_server(subject.server, said[: place + 1], lie, answers)


def _lie_throughout(server: Executor, said: Sequence[tuple[Tensors, Arrays]]) -> Iterator[str]:
    """Tell a symbolic dimension wrongly in every wire that has it, up to the task's end."""
    phase = server.manifest.phase(said[0][0].phase)
    shapes = {wire.tensor.name: wire.tensor.shape for wire in phase.wires}
    sizes = {
        dim: size
        for _, arrays in said
        for name, array in arrays.items()
        for dim, size in zip(shapes[name], array.shape, strict=True)
        if isinstance(dim, str)
    }
    for dim, size in sizes.items():
        for wrong in sorted({0, 1, size - 1, size + 1, 2 * size} - {size}):
            dispatcher, session = _greet(server)
            end = "accepted"
            for message, arrays in said:
                told = {
                    name: _resize(array, [wrong if d == dim else None for d in shapes[name]])
                    for name, array in arrays.items()
                }
                message = msgspec.structs.replace(message, session=session)
                for chunks in dispatcher.handle(b"".join(encode_message(message, told))):
                    answer, _ = decode_message(b"".join(chunks))
                    end = answer.code if isinstance(answer, Fault) else end
                if end != "accepted":
                    break
            assert end != "accepted" or wrong > 0, dim
            yield f"server {end}"


def _resize(array: np.ndarray, sizes: Sequence[int | None]) -> np.ndarray:
    for axis, size in enumerate(sizes):
        if size is not None:
            array = np.take(array, np.arange(size) % array.shape[axis], axis)
    return array


def _greet(server: Executor) -> tuple[Dispatcher, str]:
    dispatcher, name = Dispatcher(Registry(server)), uuid.uuid4().hex
    wires = list_wires(server.manifest)
    hello = Hello(digest=server.manifest.digest, session=name, generation=1, step=0, wires=wires)
    list(dispatcher.handle(b"".join(encode_message(hello))))
    return dispatcher, name


def _tell_server(
    server: Executor, said: Sequence[tuple[Tensors, Arrays]], lie: Lie, answers: Sequence[bytes]
) -> str:
    """Give a new session all of ``said``, with the lie in the last message."""
    dispatcher, name = _greet(server)
    count = 0
    for place, (message, arrays) in enumerate(said):
        message = msgspec.structs.replace(message, session=name)
        is_lie = place == len(said) - 1
        content = lie.tell(message, arrays) if is_lie else b"".join(encode_message(message, arrays))
        for chunks in dispatcher.handle(content):
            answer, found = decode_message(b"".join(chunks))
            if isinstance(answer, Fault):
                assert is_lie, (place, answer)
                return answer.code
            if is_lie:
                _compare(lie, answer, found, answers[count])
            count += 1
    return "accepted"


def _compare(lie: Lie, answer: object, found: Arrays, honest: bytes) -> None:
    """Hold the answer to a message with other rows against that to the honest one."""
    assert isinstance(answer, Tensors), answer
    read = _read(honest)
    assert read is not None
    expected = read[1]
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert np.isfinite(array).all(), name
        if answer.phase == "predict" and lie.axis == 0:
            assert len(array) == lie.size
            rows = min(lie.size, len(expected[name]))
            np.testing.assert_allclose(array[:rows], expected[name][:rows], rtol=1e-4, atol=1e-5)


def _lie_to_client(
    subject: Subject, phase: str, honest: _Recorder, results: Arrays
) -> Iterator[str]:
    wires = subject.bundle.client.manifest.phase(phase).wires
    shapes = {wire.tensor.name: wire.tensor.shape for wire in wires}
    for place, content in enumerate(honest.received):
        read = _read(content)
        for lie in list_lies(read[1]) if read else ():
            try:
                found = subject.perform(phase, _Recorder(subject.server, lie, place))
            except SplitonnxError as error:
                yield f"client {type(error).__name__}"
                continue
            # a size that inference does not know is believed where nothing else depends on it
            assert UNKNOWN in str(shapes[lie.wire][lie.axis]), lie
            assert found.keys() == results.keys()
            yield "client accepted"


def list_places(entry: Entry) -> list[Place]:
    """List where the zoo's tests cut a model: single cuts, U-shapes, labels kept home, several."""
    model = entry.build()
    names = [found.tensor for found in inspect(model)]
    places: list[Place] = [(name, ()) for name in names]
    places += combinations(names, 2)
    places.append((names[0], model.graph.output[0].name))
    return [*places, (entry.several, ())] if entry.several else places


def choose_places(entry: Entry) -> list[Place]:
    """Choose a first and a last cut, a U-shape of both, and cuts of several tensors."""
    places = list_places(entry)
    names = [at for at, tail in places if not tail and isinstance(at, str)]
    chosen: list[Place] = [(names[0], ()), (names[-1], ()), (names[0], names[-1])]
    return [place for place in places if place in chosen or not isinstance(place[0], str)]


def try_model(name: str, *, every: bool) -> Counter[str]:
    """Try a model of the zoo at its chosen places, or at ``every`` one and for both targets."""
    entry = ZOO[name]
    ends: Counter[str] = Counter()
    targets: list[Target] = ["training", "portable"] if every else ["training"]
    for target in targets:
        for at, tail in list_places(entry) if every else choose_places(entry):
            bundle = cut(
                entry.build(), at=at, tail_at=tail, loss=entry.loss,
                client_target=target, server_target=target,
            )  # fmt: skip
            assert bundle.server is not None
            server = Executor(bundle.server, ENGINE)
            data = entry.data(BATCH)
            ends.update(try_subject(Subject(bundle=bundle, server=server, data=data)))
            ends["cuts"] += 1
    return ends


def main() -> None:
    """Try the models named on the command line."""
    setattr(clients, "Engine", _SharedEngine)  # noqa: B010 - a client makes its own
    names = [word for word in sys.argv[1:] if not word.startswith("-")]
    for name in names or ZOO:
        ends = try_model(name, every="--every" in sys.argv)
        print(json.dumps({"model": name, **dict(sorted(ends.items()))}), flush=True)


if __name__ == "__main__":
    main()
