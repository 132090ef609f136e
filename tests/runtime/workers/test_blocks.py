"""Memory that a server shares with its workers: what goes in comes out, and lies are refused."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from splitonnx.errors import FormatError
from splitonnx.runtime.workers.blocks import (
    SharedTensors,
    Slot,
    look_up,
    make_block,
    measure,
    open_block,
    put,
    take,
)

TENSORS: dict[str, np.ndarray] = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "empty": np.empty((0, 4), np.int64),
    "scalar": np.array(7, np.int64),
    "large": np.arange(3 << 18, dtype=np.float32),
}
OTHER_SIDE = """
import sys
import msgspec
import numpy as np
from splitonnx.runtime.workers.blocks import Place, Slot, open_block, take
place, slots = msgspec.json.decode(sys.stdin.buffer.read(), type=tuple[Place, tuple[Slot, ...]])
taken = take(open_block(place, None), slots)
print(sum(float(array.sum()) for array in taken.values()))
"""

named = pytest.mark.parametrize("named", [False, True] if sys.platform == "linux" else [True])


@named
def test_tensors_come_out_as_they_went_in_after_a_block_has_grown(named: bool) -> None:
    block = make_block(named=named)
    try:
        block.reserve(measure(TENSORS.values()))
        taken = take(block, put(block, TENSORS))
        block.reserve(1 << 23)  # what was taken is a copy
        for name, array in TENSORS.items():
            np.testing.assert_array_equal(taken[name], array)
            assert taken[name].dtype == array.dtype
            assert not taken[name].flags.writeable
    finally:
        block.close()


@named
def test_a_block_that_was_emptied_is_used_again(named: bool) -> None:
    block = make_block(named=named)
    try:
        for _ in range(2):
            block.reserve(measure(TENSORS.values()))
            other = open_block(block.place, None)
            slots = put(block, TENSORS)
            for name, array in take(other, slots).items():
                np.testing.assert_array_equal(array, TENSORS[name])
            if named:
                other.close()
            block.empty()
            assert not any(open_block(block.place, block).view[:4096])
    finally:
        block.close()


@named
def test_another_process_sees_them_and_leaves_the_block_behind(named: bool) -> None:
    block = make_block(named=named)
    try:
        block.reserve(measure(TENSORS.values()))
        slots = put(block, TENSORS)
        numbers = () if named else (block.number,)  # type: ignore[union-attr]
        for _ in range(2):  # the first one's end is not the block's
            run = subprocess.run(
                [sys.executable, "-c", OTHER_SIDE],
                input=msgspec.json.encode((block.place, slots)),
                capture_output=True,
                pass_fds=numbers,
                check=True,
            )
            assert float(run.stdout) == sum(float(array.sum()) for array in TENSORS.values())
            assert run.stderr == b""
    finally:
        block.close()


@pytest.mark.parametrize(
    "slot",
    [
        Slot("a", "F32", (1 << 18, 2), 0),
        Slot("a", "F32", (1,), 1 << 20),
        Slot("a", "F32", (1,), -64),
        Slot("a", "F32", (1,), 4),
        Slot("a", "F32", (-1,), 0),
        Slot("a", "F32", (1 << 62, 1 << 62), 0),
        Slot("a", "object", (1,), 0),
        Slot("a", "F32", (1,) * 33, 0),
    ],
)
def test_a_slot_that_is_no_tensor_of_its_block_is_refused(slot: Slot) -> None:
    block = make_block()
    try:
        with pytest.raises(FormatError, match="tensor 'a'"):
            take(block, [slot])
    finally:
        block.close()


@pytest.mark.skipif(sys.platform != "linux", reason="sealed files")
def test_the_other_side_cannot_shrink_a_block_under_the_servers_hands() -> None:
    import os

    block = make_block(named=False)
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(block.number, 0)  # type: ignore[union-attr]
    finally:
        block.close()


@pytest.mark.skipif(sys.platform != "linux", reason="sealed files are Linux's")
def test_nobody_can_change_what_all_workers_share() -> None:
    shared = SharedTensors.make(TENSORS)
    assert shared is not None
    with pytest.raises(PermissionError):
        os.pwrite(shared.number, b"x", 0)
    with pytest.raises(PermissionError):
        os.ftruncate(shared.number, 0)
    with pytest.raises(PermissionError):
        mmap.mmap(shared.number, 1)
    mapped = look_up(shared.number, shared.slots)
    for found in (shared.tensors, mapped):
        assert [*found] == [*TENSORS]
        for name, array in TENSORS.items():
            np.testing.assert_array_equal(found[name], array)
            assert not array.size or not found[name].flags.writeable
    with pytest.raises(FormatError):
        look_up(shared.number, [Slot("far", "F32", (1,), 1 << 40)])
    shared.close()
    shared.close()
    np.testing.assert_array_equal(mapped["large"], TENSORS["large"])
