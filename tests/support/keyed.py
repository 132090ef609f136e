"""The documented function of seed, step, micro-batch and node from which random numbers come."""

from __future__ import annotations

import zlib

import numpy as np

SPREAD = (0x3243F6A9, 0x2B7E1517, 0x1B873593)


def scramble(x: np.ndarray, within: np.ndarray | int = 0) -> np.ndarray:
    """lowbias32 with the second half of the key between its multiplications."""
    x = x ^ (x >> np.uint32(16))
    x = (x * np.uint32(0x7FEB352D)) ^ np.uint32(within)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    result: np.ndarray = x ^ (x >> np.uint32(16))
    return result


def draw_words(key: tuple[int, int, int], node: str, size: int) -> np.ndarray:
    """Draw whole numbers below 2**32 for the node of that name."""
    spread = sum(k % 2**31 * c for k, c in zip(key, SPREAD, strict=True))
    named = np.array([(spread + zlib.crc32(node.encode())) % 2**32], np.uint32)
    first = scramble(named)
    second = scramble(first ^ np.uint32(0x5BD1E995))
    index = ((np.arange(size) + int(first[0])) % 2**32).astype(np.uint32)
    return scramble(index, second[0])
