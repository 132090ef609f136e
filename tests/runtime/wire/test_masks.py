"""Masks that are removed in place; the judge is the websockets library's own function."""

from __future__ import annotations

import numpy as np
import pytest
from websockets.utils import apply_mask

from splitonnx.runtime.wire.masks import unmask

KEY = bytes([1, 20, 150, 255])


@pytest.mark.parametrize("offset", range(9))
@pytest.mark.parametrize("size", [0, 1, 3, 7, 8, 9, 15, 16, 17, 4097])
def test_a_payload_of_any_size_at_any_address_loses_its_mask(offset: int, size: int) -> None:
    memory = bytearray(np.random.default_rng(0).bytes(offset + size + 9))
    before, content, after = (
        memory[:offset],
        memory[offset : offset + size],
        memory[offset + size :],
    )
    unmask(memoryview(memory)[offset : offset + size], KEY)
    assert memory == before + apply_mask(bytes(content), KEY) + after


def test_a_mask_of_a_mask_is_none() -> None:
    content = bytearray(range(256))
    unmask(memoryview(content), KEY)
    assert content != bytearray(range(256))
    unmask(memoryview(content), KEY)
    assert content == bytearray(range(256))
