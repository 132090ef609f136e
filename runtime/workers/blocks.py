"""Memory that a server shares with one of its workers, and the layout of tensors in it.

Each worker has two blocks of shared memory, one per direction.  The server creates and enlarges the
blocks; the worker maps the block that the server names.  On Linux, a block is an anonymous file
that the worker inherits.  The file is sealed so that neither process can shrink it while the other
is using it.  On other systems, a block is named shared memory; when it has to grow, it is replaced
by a larger one with another name.  This module does not start processes.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from multiprocessing import shared_memory
from typing import Protocol

import msgspec
import numpy as np

from splitonnx.errors import FormatError
from splitonnx.graph_limits import STAGE
from splitonnx.tensors import DTYPES, name_dtype

ALIGNMENT = 64
"""Every tensor in a block begins at a multiple of this many bytes."""
SMALLEST = 1 << 20
"""Size of the smallest block in bytes."""
MAX_RANK = STAGE.rank


class Place(msgspec.Struct, frozen=True):
    """The name with which the other process opens a block, and the block's size in bytes."""

    name: str
    size: int


class Slot(msgspec.Struct, frozen=True):
    """A tensor's position, dtype and shape; ``start`` is the offset of its first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int


class Block(Protocol):
    """A block of memory that two processes share; the process that created it is its owner."""

    @property
    def place(self) -> Place:
        """Return the name with which the other process opens the block, and the block's size."""

    @property
    def view(self) -> memoryview:
        """Return a view of all bytes of the block."""

    def reserve(self, size: int) -> None:
        """Enlarge the block to at least ``size`` bytes; its content may be lost.

        Only the owner may call this method.
        """

    def empty(self) -> None:
        """Discard the content and return its memory to the system; the block can be used again.

        Only the owner may call this method.
        """

    def close(self) -> None:
        """Release the block."""


class FileBlock:
    """A block in an anonymous file; a child process inherits the file's descriptor."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._memory: mmap.mmap | None = None
        self._size = 0

    @classmethod
    def make(cls) -> FileBlock:
        """Create a block that this process owns."""
        import fcntl

        number = os.memfd_create("splitonnx", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
        block = cls(number)
        try:
            block.reserve(SMALLEST)
        except OSError:
            block.close()
            raise
        return block

    @property
    def place(self) -> Place:
        """Return a name with the inherited file's descriptor, and the block's size."""
        return Place(f"file:{self.number}", self._size)

    @property
    def view(self) -> memoryview:
        """Return a view of all bytes of the block."""
        assert self._memory is not None
        return memoryview(self._memory)

    def reserve(self, size: int) -> None:
        """Enlarge the block to at least ``size`` bytes."""
        if size > self._size:
            size = _round_up(size, self._size)
            os.ftruncate(self.number, size)
            self.map(size)

    def map(self, size: int) -> None:
        """Map the first ``size`` bytes of the file into memory.

        Arrays that use an earlier mapping stay valid.
        """
        self._memory = mmap.mmap(self.number, size)
        self._size = size

    def unmap(self) -> None:
        """Release the mapping; no array may still be using it."""
        assert self._memory is not None
        self._memory.close()
        self._memory = None

    def empty(self) -> None:
        """Discard the content and return its memory to the system; the block can be used again."""
        assert self._memory is not None
        self._memory.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Release the mapping and close the file."""
        self._memory = None
        os.close(self.number)


class NamedBlock:
    """A block in named shared memory; the name changes when the block grows."""

    def __init__(self, memory: shared_memory.SharedMemory, *, is_owner: bool) -> None:
        self._memory = memory
        self._is_owner = is_owner

    @classmethod
    def make(cls) -> NamedBlock:
        """Create a block that this process owns."""
        memory = shared_memory.SharedMemory(create=True, size=SMALLEST)
        return cls(memory, is_owner=True)

    @property
    def place(self) -> Place:
        """Return the name with which the other process opens the block, and the block's size."""
        return Place(f"name:{self._memory.name}", self._memory.size)

    @property
    def view(self) -> memoryview:
        """Return a view of all bytes of the block."""
        assert self._memory.buf is not None
        return self._memory.buf

    def reserve(self, size: int) -> None:
        """Enlarge the block to at least ``size`` bytes; if it grows, its content is lost."""
        before = self._memory.size
        if size > before:
            self.close()
            size = _round_up(size, before)
            self._memory = shared_memory.SharedMemory(create=True, size=size)

    def empty(self) -> None:
        """Replace the block with a new one of the smallest size; the content is lost."""
        self.close()
        self._memory = shared_memory.SharedMemory(create=True, size=SMALLEST)

    def close(self) -> None:
        """Release the block; if this process owns the block, also delete the shared memory."""
        if self._is_owner:
            self._memory.unlink()
        with suppress(BufferError):  # an array still uses it and keeps the mapping
            self._memory.close()


class SharedTensors:
    """Tensors in an anonymous file that can no longer be changed.

    Child processes inherit the file, and ``tensors`` are read-only arrays that map it.
    """

    def __init__(self, number: int, slots: tuple[Slot, ...]) -> None:
        self.number = number
        self.slots = slots
        self.tensors = look_up(number, slots)
        self._close = weakref.finalize(self, os.close, number)

    @classmethod
    def make(cls, tensors: Mapping[str, np.ndarray]) -> SharedTensors | None:
        """Copy tensors to a new file that child processes can inherit, and make it unchangeable.

        Return ``None`` if the platform does not support such files.
        """
        if not hasattr(os, "memfd_create"):
            return None
        import fcntl

        number = os.memfd_create("splitonnx-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        block = FileBlock(number)
        block.reserve(max(SMALLEST, measure(tensors.values())))
        slots = put(block, tensors)
        block.unmap()  # what can be written to cannot be sealed
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(number, fcntl.F_ADD_SEALS, seals)
        return cls(number, slots)

    def close(self) -> None:
        """Close the file; do nothing if it is already closed.

        Arrays that map the file stay valid.
        """
        self._close()


def look_up(number: int, slots: Iterable[Slot]) -> dict[str, np.ndarray]:
    """Map the tensors of an inherited file as read-only arrays.

    ``number`` is the file descriptor, and ``slots`` are the tensors' positions in the file.

    Raises:
        FormatError: a position is outside the file, or a dtype or shape is invalid.
    """
    view = memoryview(mmap.mmap(number, 0, access=mmap.ACCESS_READ))
    return {slot.name: _look(view, slot) for slot in slots}


def make_block(*, named: bool = not hasattr(os, "memfd_create")) -> FileBlock | NamedBlock:
    """Create a block of the kind that this platform supports."""
    return NamedBlock.make() if named else FileBlock.make()


def open_block(place: Place, known: Block | None) -> Block:
    """Map a block that the other process created.

    ``known`` is the block that was mapped before, if any.  If that block is still at ``place``,
    return it instead of mapping it again.
    """
    if known is not None and known.place == place:
        return known
    kind, _, name = place.name.partition(":")
    if kind == "file":
        block = FileBlock(int(name))
        block.map(place.size)
        return block
    memory = shared_memory.SharedMemory(name)
    if sys.platform != "win32":  # or this process's end would be taken for the memory's
        from multiprocessing import resource_tracker

        resource_tracker.unregister(f"/{memory.name.lstrip('/')}", "shared_memory")
    return NamedBlock(memory, is_owner=False)


def measure(tensors: Iterable[np.ndarray]) -> int:
    """Compute how many bytes tensors take in a block, including padding."""
    return sum(array.nbytes + -array.nbytes % ALIGNMENT for array in tensors)


def put(block: Block, tensors: Mapping[str, np.ndarray]) -> tuple[Slot, ...]:
    """Copy tensors into a block, and return their positions; the block must be large enough."""
    slots, start, view = [], 0, block.view
    for name, array in tensors.items():
        slot = Slot(name, name_dtype(array.dtype), array.shape, start)
        np.copyto(_look(view, slot), array)
        slots.append(slot)
        start += array.nbytes + -array.nbytes % ALIGNMENT
    return tuple(slots)


def take(block: Block, slots: Iterable[Slot]) -> dict[str, np.ndarray]:
    """Copy tensors out of a block as read-only arrays.

    ``slots`` are the tensors' positions.  They are checked, because they may come from untrusted
    code.

    Raises:
        FormatError: a position is outside the block, a dtype or shape is invalid, or a Boolean
            tensor contains a byte other than 0 and 1.
    """
    taken = {}
    for slot in slots:
        array = _look(block.view, slot).copy()
        if array.dtype == np.bool_ and array.view(np.uint8).max(initial=0) > 1:
            raise FormatError(f"tensor '{slot.name[:80]}'", "its truth values are no such")
        array.flags.writeable = False
        taken[slot.name] = array
    return taken


def _look(view: memoryview, slot: Slot) -> np.ndarray:
    dtype = DTYPES.get(slot.dtype)
    if dtype is None or len(slot.shape) > MAX_RANK or min(slot.shape, default=0) < 0:
        raise FormatError(f"tensor '{slot.name[:80]}'", "it has no such dtype or shape")
    size = math.prod(slot.shape) * dtype.itemsize
    if slot.start < 0 or slot.start % ALIGNMENT or slot.start + size > len(view):
        raise FormatError(f"tensor '{slot.name[:80]}'", "it is outside its block")
    if not size:
        return np.empty(slot.shape, dtype)
    return np.frombuffer(view, np.uint8, size, slot.start).view(dtype).reshape(slot.shape)


def _round_up(size: int, before: int) -> int:
    grown = max(size, before + before // 2)
    return grown + -grown % mmap.PAGESIZE
