"""Buffers are used again when nothing refers to them any more, and no sooner."""

from __future__ import annotations

import numpy as np

from splitonnx.runtime.engine.tiles.buffers import BufferPool

SHAPE = (3, 5)


def locate(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_an_array_has_the_shape_and_begins_at_a_line_of_the_cache() -> None:
    array = BufferPool([SHAPE], keeps=True).take(SHAPE)
    assert array.shape == SHAPE
    assert array.dtype == np.float32
    assert locate(array) % 64 == 0
    assert array.flags.c_contiguous
    assert array.flags.writeable


def test_memory_is_used_again_when_the_array_is_gone() -> None:
    pool = BufferPool([SHAPE], keeps=True)
    array = pool.take(SHAPE)
    place = locate(array)
    del array
    assert locate(pool.take(SHAPE)) == place


def test_memory_is_not_used_again_while_a_view_of_a_view_is_left() -> None:
    pool = BufferPool([SHAPE], keeps=True)
    array = pool.take(SHAPE)
    array[:] = 7
    view = array[1:].ravel()[2:]
    del array
    other = pool.take(SHAPE)
    other[:] = 8
    assert (view == 7).all()


def test_shapes_of_equally_many_elements_share_their_memory() -> None:
    pool = BufferPool([SHAPE, (15,)], keeps=True)
    arrays = [pool.take((15,)), pool.take(SHAPE)]
    places = {locate(array) for array in arrays}
    del arrays
    again = [pool.take(SHAPE), pool.take(SHAPE)]
    assert {locate(array) for array in again} == places


def test_no_more_is_kept_than_one_run_needs() -> None:
    pool = BufferPool([SHAPE, SHAPE, (2,)], keeps=True)
    arrays = [pool.take(SHAPE) for _ in range(5)]
    del arrays
    assert {size: len(free) for size, free in pool._free.items()} == {15: 2, 2: 0}


def test_nothing_is_kept_where_the_heap_keeps_it() -> None:
    pool = BufferPool([SHAPE], keeps=False)
    pool.take(SHAPE)
    assert not pool._free[15]
