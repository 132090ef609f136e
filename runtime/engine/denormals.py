"""Flushing of denormal numbers to zero in the calling thread during a computation.

Arithmetic on denormals (tiny numbers close to zero) is many times slower than on other numbers, so
a client could slow a server down by sending denormals.  ONNX Runtime's own option affects the
threads of its pool, but not the calling thread.  With that option alone, whether an element is
flushed would depend on the thread that computes it.  Therefore this module sets the calling
thread's control register through the platform's C library, and restores it afterwards.  If setting
the register has no effect, :data:`CAN_FLUSH` is false and denormals are not flushed in any thread.
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
"""Size of a buffer in bytes; larger than any platform's ``fenv_t``."""
_MOST_KNOWN = 64
"""Most floating-point environments for which the version that flushes denormals is cached."""
_WINDOWS_FLUSH, _WINDOWS_MASK = 0x01000000, 0x03000000
"""``_DN_FLUSH`` and ``_MCW_DN`` of ``_controlfp_s``."""

_SetFlush = Callable[[], Callable[[], None]]
"""A function that sets the calling thread's bits and returns a function that restores them."""


@dataclass(frozen=True, kw_only=True)
class _Register:
    """The offset of the control register in a platform's ``fenv_t``, and the bits to set in it."""

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
    """Return the function that flushes denormals on this platform, or ``None`` if none works."""
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
    """Check that ``set_flush`` flushes denormals, and that its result restores the thread."""
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
"""Whether threads can flush denormals on this platform."""


def set_flush() -> Callable[[], None]:
    """Flush denormals to zero in the calling thread, if the platform supports it.

    Return a function that restores the thread's earlier setting.  Threads that are started from
    this thread before that function is called also flush denormals.
    """
    return _do_nothing if _SET_FLUSH is None else _SET_FLUSH()


@contextmanager
def flushing_denormals() -> Iterator[None]:
    """Flush denormals to zero in the calling thread for the duration of a ``with`` block."""
    restore = set_flush()
    try:
        yield
    finally:
        restore()


def _do_nothing() -> None:
    pass
