"""Memory that messages use one after the other."""

from __future__ import annotations

import numpy as np

from splitonnx.runtime.wire.buffers import BufferPool

MIB = 1 << 20


def find_address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def test_memory_is_used_again_once_its_last_view_is_gone() -> None:
    pool = BufferPool()
    memory = pool.take(3 * MIB - 7)
    assert len(memory) == 3 * MIB - 7
    tensor = np.frombuffer(memory[8:], np.uint8)[5:]
    address = find_address(memory)
    del memory
    assert pool.idle_bytes == 0  # the tensor is there
    other = pool.take(3 * MIB)
    assert find_address(other) != address
    del tensor
    assert pool.idle_bytes == 3 * MIB
    assert find_address(pool.take(3 * MIB)) == address


def test_two_messages_never_share_memory() -> None:
    pool = BufferPool()
    for _ in range(3):
        first, second = pool.take(2 * MIB), pool.take(2 * MIB)
        first[:], second[:] = b"a" * (2 * MIB), b"b" * (2 * MIB)
        assert first == b"a" * (2 * MIB)
        del first, second
    assert pool.idle_bytes == 4 * MIB


def test_a_block_far_too_large_is_left_to_others() -> None:
    pool = BufferPool()
    address = find_address(pool.take(8 * MIB))
    small = pool.take(3 * MIB)
    assert find_address(small) != address
    assert find_address(pool.take(4 * MIB)) == address


def test_no_more_is_kept_than_allowed_and_the_oldest_goes_first() -> None:
    pool = BufferPool(most=5 * MIB)
    blocks = [pool.take(size * MIB) for size in (1, 2, 3)]
    for size in (1, 2, 3):
        blocks.pop(0)
        assert pool.idle_bytes == {1: 1, 2: 3, 3: 5}[size] * MIB
    large = pool.take(6 * MIB)
    del large
    assert pool.idle_bytes == 0


def test_a_block_that_returns_while_the_pool_is_in_use_is_not_lost() -> None:
    pool = BufferPool()
    memory = pool.take(MIB)
    with pool._mutex:  # as a garbage collection in take() may do
        del memory
    assert pool.idle_bytes == MIB
    memory = pool.take(MIB)
    assert (len(memory), pool.idle_bytes) == (MIB, 0)
