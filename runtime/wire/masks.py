"""Remove the masks of received payloads in the memory that they were received into.

The websockets library does so into a copy, while no other thread can run.
"""

from __future__ import annotations

import numpy as np

_WORD = np.dtype(np.uint64)


def unmask(payload: memoryview, key: bytes) -> None:
    """Combine each byte with the one of ``key`` in its turn (RFC 6455, section 5.3), in place."""
    data = np.frombuffer(payload, np.uint8)
    before = min(-data.__array_interface__["data"][0] % _WORD.itemsize, len(data))
    after = before + (len(data) - before) // _WORD.itemsize * _WORD.itemsize
    words = data[before:after].view(_WORD)  # which are aligned
    np.bitwise_xor(words, np.frombuffer(_repeat(key, before, _WORD.itemsize), _WORD), out=words)
    for start, end in ((0, before), (after, len(data))):
        data[start:end] ^= np.frombuffer(_repeat(key, start, end - start), np.uint8)


def _repeat(key: bytes, start: int, size: int) -> bytes:
    """Return ``size`` bytes of the repeated key, of which the first is for byte ``start``."""
    return bytes(key[(start + place) % len(key)] for place in range(size))
