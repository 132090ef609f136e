"""Flush denormal numbers to zero in the calling thread during a computation.

Arithmetic on denormals is many times slower than on other numbers, so a client that sends them
could slow a server down.  ONNX Runtime's own option affects the threads of its pool but not the
calling thread.  With that option alone, the division of work among threads would decide which
elements are flushed.  Therefore this module sets the calling thread's control register through the
platform's C library, and restores it afterwards.  If that has no effect, :data:`CAN_FLUSH` is false
and nothing is flushed in any thread.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np

_SSE_FLUSH = 0x8040
"""The bits "flush to zero" and "denormals are zero" of MXCSR."""
_ARM_FLUSH = 1 << 24
"""The bit "flush to zero" of FPCR."""
_SIZE = 64
"""Bytes, more than any platform's ``fenv_t`` has."""
_MOST_KNOWN = 64
"""Most floating-point environments whose flushing version is cached."""
_WINDOWS_FLUSH, _WINDOWS_MASK = 0x01000000, 0x03000000
"""``_DN_FLUSH`` and ``_MCW_DN`` of ``_controlfp_s``."""

_SetFlush = Callable[[], Callable[[], None]]
"""Sets the calling thread's bits and returns a function that restores them."""


@dataclass(frozen=True, kw_only=True)
class _Register:
    """Where a platform's ``fenv_t`` has the control register, and its bits that flush."""

    offset: int
    bits: int


_REGISTERS = {
    ("linux", "x86_64"): _Register(offset=28, bits=_SSE_FLUSH),
    ("linux", "aarch64"): _Register(offset=0, bits=_ARM_FLUSH),
    ("darwin", "x86_64"): _Register(offset=4, bits=_SSE_FLUSH),
    ("darwin", "arm64"): _Register(offset=8, bits=_ARM_FLUSH),
}


def _make_posix(register: _Register) -> _SetFlush:
    library = ctypes.PyDLL(None)  # a call is too short to release the interpreter's lock
    read, write = library.fegetenv, library.fesetenv
    at, bits = register.offset, register.bits
    new = ctypes.c_char * _SIZE

    known: dict[bytes, bytes] = {}  # threads have few environments

    def make(before: bytes) -> bytes:
        flushing = bytearray(before)
        word = int.from_bytes(flushing[at : at + 4], "little") | bits
        flushing[at : at + 4] = word.to_bytes(4, "little")
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known[before] = bytes(flushing)
        return known[before]

    def set_flush() -> Callable[[], None]:
        buffer = new()
        read(buffer)
        before = buffer.raw
        write(known.get(before) or make(before))
        return partial(write, before)

    return set_flush


def _make_windows() -> _SetFlush:
    control = ctypes.CDLL("ucrtbase")._controlfp_s

    def set_flush() -> Callable[[], None]:
        before, unused = ctypes.c_uint(), ctypes.c_uint()
        control(ctypes.byref(before), 0, 0)
        control(ctypes.byref(unused), _WINDOWS_FLUSH, _WINDOWS_MASK)
        return lambda: control(ctypes.byref(unused), before.value & _WINDOWS_MASK, _WINDOWS_MASK)

    return set_flush


def _find() -> _SetFlush | None:
    """Find this platform's way, if it has one that acts."""
    register = _REGISTERS.get((sys.platform, platform.machine()))
    try:
        if sys.platform == "win32":
            set_flush = _make_windows()
        elif register is not None:
            set_flush = _make_posix(register)
        else:
            return None
    except (OSError, AttributeError):
        return None
    return set_flush if _acts(set_flush) else None


def _acts(set_flush: _SetFlush) -> bool:
    """Return whether it flushes, and leaves the thread as it was."""
    before = _halve_denormals()
    restore = set_flush()
    flushed = _halve_denormals()
    restore()
    return not any(flushed) and _halve_denormals() == before


def _halve_denormals() -> bytes:
    # as bytes: a comparison of numbers takes a denormal for zero while they are flushed
    return bytes(np.full(16, 1e-40, np.float32) * np.float32(0.5))


_SET_FLUSH = _find()
CAN_FLUSH = _SET_FLUSH is not None
"""Whether this platform's threads can flush denormals."""


def set_flush() -> Callable[[], None]:
    """Flush denormals to zero in the calling thread, if possible.

    Threads that it starts meanwhile also flush.  The returned function restores the thread.
    """
    return _do_nothing if _SET_FLUSH is None else _SET_FLUSH()


@contextmanager
def flushing_denormals() -> Iterator[None]:
    """Flush denormals to zero in the calling thread while the context is open."""
    restore = set_flush()
    try:
        yield
    finally:
        restore()


def _do_nothing() -> None:
    pass
