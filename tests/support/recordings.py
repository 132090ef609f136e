"""A connection in memory that records the tensors of every message, by phase and direction.

They are held against what ``explain`` says of the client.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import pytest

from splitonnx.bundles import PartyBundle
from splitonnx.codecs import Chunk
from splitonnx.commands.disclosures import list_lines
from splitonnx.disclosures import Sending
from splitonnx.messages import Tensors, decode_message
from splitonnx.runtime.client.explanations import explain
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import MemoryTransport
from splitonnx.runtime.server.dispatchers import Dispatcher
from splitonnx.runtime.server.registries import Registry

Arrays = dict[str, np.ndarray]
_TYPES = {"F32": "float32", "I64": "int64", "I32": "int32", "BOOL": "bool"}


class RecordingTransport(MemoryTransport):
    """Notes for each task of a phase the tensors that were sent and received."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(Dispatcher(Registry(executor)))
        self.sent: dict[str, dict[int, Arrays]] = defaultdict(lambda: defaultdict(dict))
        self.received: dict[str, dict[int, Arrays]] = defaultdict(lambda: defaultdict(dict))
        self._tasks = 0

    def send(self, chunks: Sequence[Chunk]) -> None:
        self._note(b"".join(chunks), self.sent, is_mine=True)
        super().send(chunks)

    def receive(self) -> bytes:
        content = super().receive()
        self._note(content, self.received, is_mine=False)
        return content

    def _note(self, content: bytes, noted: dict[str, dict[int, Arrays]], *, is_mine: bool) -> None:
        message, tensors = decode_message(content)
        if isinstance(message, Tensors):
            self._tasks += is_mine and message.turn == 0
            noted[message.phase][self._tasks].update(tensors)
        else:
            assert not tensors


def record_connections(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> list[RecordingTransport]:
    """Record every connection in memory that a module makes, in the list that is returned."""
    made: list[RecordingTransport] = []

    def connect(executor: Executor) -> RecordingTransport:
        made.append(RecordingTransport(executor))
        return made[-1]

    monkeypatch.setattr(module, "connect_in_memory", connect)
    return made


def check_explained(
    party: PartyBundle, recording: RecordingTransport, batch: int, tasks: dict[str, int]
) -> None:
    """Check that in so many tasks a phase exactly what ``explain`` says left, and arrived."""
    assert {phase: len(sent) for phase, sent in recording.sent.items()} == tasks
    explanation = explain(party, batch=batch)
    _check_printed(list(list_lines(explanation)), recording)
    for phase in explanation.phases:
        for sending, recorded in (
            (phase.leaves, recording.sent),
            (phase.arrives, recording.received),
        ):
            for arrays in recorded[sending.phase].values():
                _check_sent(sending, arrays)


def _check_printed(lines: Sequence[str], recording: RecordingTransport) -> None:
    """Check that the bytes that are printed for a step are those of each task.

    A tensor of which only some sizes are known is printed without its bytes.
    """
    phase = ""
    for line in lines:
        if match := re.match(r"(\w+), per step", line):
            phase = match[1]
        for start, recorded in (("leaves", recording.sent), ("comes in", recording.received)):
            if line.startswith(f"  {start}: "):
                printed = re.findall(r"\(([\d,]+) bytes\)", line)
                sizes = Counter(int(size.replace(",", "")) for size in printed)
                for arrays in recorded[phase].values():
                    found = Counter(array.nbytes for array in arrays.values())
                    assert sizes <= found
                    assert sizes == found or line.count("[") > len(printed)


def _check_sent(sending: Sending, arrays: Arrays) -> None:
    """Check names, types, shapes and bytes; a dimension that has a name only may have any size."""
    assert [tensor.wire for tensor in sending.tensors if tensor.wire not in arrays] == []
    assert len(arrays) == len(sending.tensors)
    for tensor in sending.tensors:
        array = arrays[tensor.wire]
        dtype, _, dims = tensor.declared.removesuffix("]").partition("[")
        assert array.dtype.name == _TYPES[dtype]
        shape = [dim for dim in dims.split(", ") if dim]
        assert len(shape) == array.ndim
        sizes = [int(dim) if dim.isdecimal() else None for dim in shape]
        assert all(s in (None, size) for s, size in zip(sizes, array.shape, strict=True))
        assert tensor.bytes == (None if None in sizes else array.nbytes)
    if sending.bytes is not None:
        assert sending.bytes == sum(array.nbytes for array in arrays.values())
