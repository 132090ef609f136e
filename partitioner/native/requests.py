"""Write and read what the process for native code is asked, and what it answers.

Large contents, such as the weights of a model, can be kept: they are sent to a process once, and
later requests name them by a number.  This module does not know what is done with a request.
"""

from __future__ import annotations

import struct
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any, BinaryIO

import msgspec

SECONDS = 300
"""Time limit of one request; the process exits if a request takes longer."""
_LENGTH = struct.Struct("<Q")
"""The prefix of each request and response: its length in bytes."""
_KEPT = 1
"""The code of the extension type of MessagePack that stands for a kept content, by its key."""
_HEAD = 64
"""Contents with other first bytes than these are not compared with each other."""
_KEYS = count()


class Kept:
    """Bytes that are sent once to each process, which keeps them as long as this object exists."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.key = next(_KEYS)


_POOL: ContextVar[dict[tuple[int, bytes], list[Kept]] | None] = ContextVar("pool", default=None)


@contextmanager
def keeping_contents() -> Iterator[None]:
    """Have :func:`keep` return the same object for equal contents inside a ``with`` block.

    Outside of such a block, each of its calls returns a new object.  A block inside another one
    changes nothing.
    """
    if _POOL.get() is not None:
        yield
        return
    token = _POOL.set({})
    try:
        yield
    finally:
        _POOL.reset(token)


def keep(content: bytes) -> Kept:
    """Return an object that stands for a large content in the arguments of a request."""
    pool = _POOL.get()
    if pool is None:
        return Kept(content)
    known = pool.setdefault((len(content), content[:_HEAD]), [])
    for kept in known:
        if kept.content == content:
            return kept
    known.append(Kept(content))
    return known[-1]


class RequestWriter:
    """Writes the requests to one process, and knows which contents that process keeps."""

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self._released: list[int] = []

    @property
    def kept_bytes(self) -> int:
        """Return how many bytes of contents the process keeps."""
        return sum(self._sizes.values())

    def write(self, name: str, arguments: Sequence[Any]) -> bytes:
        """Return the request to call the function ``name``; the arguments may hold :class:`Kept`.

        It tells the process which contents it need not keep any more.
        """
        fresh: dict[int, Kept] = {}

        def refer(value: object) -> msgspec.msgpack.Ext:
            if not isinstance(value, Kept):
                raise NotImplementedError(f"a request with a {type(value).__name__}")
            if value.key not in self._sizes:
                fresh[value.key] = value
            return msgspec.msgpack.Ext(_KEPT, str(value.key).encode())

        call = msgspec.msgpack.encode([name, arguments], enc_hook=refer)
        released = [self._released.pop() for _ in range(len(self._released))]
        for key in released:
            del self._sizes[key]
        for kept in fresh.values():
            self._sizes[kept.key] = len(kept.content)
            weakref.finalize(kept, self._released.append, kept.key).atexit = False
        contents = {key: kept.content for key, kept in fresh.items()}
        return msgspec.msgpack.encode([released, contents, msgspec.Raw(call)])


class RequestReader:
    """Reads the requests to this process, and keeps contents for later requests."""

    def __init__(self) -> None:
        self._contents: dict[int, bytes] = {}

    @property
    def kept_bytes(self) -> int:
        """Return how many bytes of contents are kept."""
        return sum(map(len, self._contents.values()))

    def read(self, request: bytes) -> tuple[str, list[Any]]:
        """Return the name of the function to call, and its arguments."""
        released, fresh, call = msgspec.msgpack.decode(request, type=_Request)
        for key in released:
            del self._contents[key]
        self._contents.update(fresh)
        name, arguments = msgspec.msgpack.decode(call, ext_hook=self._find)
        return name, arguments

    def _find(self, code: int, data: memoryview) -> bytes:
        assert code == _KEPT, f"extension type {code}"
        return self._contents[int(bytes(data))]


_Request = tuple[list[int], Mapping[int, bytes], msgspec.Raw]
"""The keys that need not be kept any more, new contents by key, and the call."""


def write_frame(sink: BinaryIO, content: bytes) -> None:
    """Write a request or response, preceded by its length."""
    sink.write(_LENGTH.pack(len(content)))
    sink.write(content)
    sink.flush()


def read_frame(source: BinaryIO) -> bytes:
    """Read a request or response and return its content.

    Raises:
        EOFError: the other process has closed its end of the pipe.
    """
    head = source.read(_LENGTH.size)
    content = source.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else b""
    if len(head) < _LENGTH.size or len(content) < _LENGTH.unpack(head)[0]:
        raise EOFError
    return content
