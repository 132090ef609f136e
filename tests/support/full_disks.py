"""Write checkpoints to a disk of 1 MiB until it is full; run in a mount namespace of its own.

    unshare --map-root-user --mount python -m tests.support.full_disks FOLDER

mounts a file system there that only this process sees, and prints what happened as JSON.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from splitonnx.errors import NotSaved
from tests.support.checkpoint_kills import SESSION, make_checkpoint, open_store

DISK = 1 << 20
"""Bytes; a checkpoint takes 60,000."""


class Outcome(msgspec.Struct, kw_only=True):
    """What a failed write said, and what stood there after it."""

    reason: str
    steps: tuple[int, ...]
    are_equal: bool
    names: tuple[str, ...]


def _write(folder: Path, step: int, *, stopped: bool = False) -> Outcome:
    store = open_store(folder)
    reason = ""
    try:
        (store.write_stopped if stopped else store.write)(make_checkpoint(step))
    except NotSaved as error:
        reason = str(error)
    steps = open_store(folder).steps()
    place = folder / "sessions" / SESSION
    return Outcome(
        reason=reason,
        steps=steps,
        are_equal=all(_is_equal(folder, number) for number in steps),
        names=tuple(sorted(path.name for path in place.iterdir())) if place.exists() else (),
    )


def _is_equal(folder: Path, step: int) -> bool:
    found, written = open_store(folder).read(step).tensors, make_checkpoint(step).tensors
    return all(found[name].tobytes() == array.tobytes() for name, array in written.items())


def fill(path: Path, *, left: int) -> None:
    """Fill the disk but for some bytes."""
    size = DISK
    with path.open("wb", buffering=0) as file:
        try:
            while size:
                size -= file.write(b"x" * min(size, 4096))
        except OSError:
            pass
        file.truncate(file.tell() - left)


def run(folder: Path) -> dict[str, Outcome]:
    outcomes = {}
    filler = folder / "filler"
    fill(filler, left=8192)
    outcomes["first, full"] = _write(folder, 5)
    filler.unlink()
    open_store(folder).write(make_checkpoint(10))
    open_store(folder).write(make_checkpoint(20))
    for left in (0, 4096, 49152):
        fill(filler, left=left)
        outcomes[f"third, {left} left"] = _write(folder, 30)
    outcomes["stopped, full"] = _write(folder, 30, stopped=True)
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    outcomes["read-only"] = _write(folder, 30)
    subprocess.run(["mount", "-o", "remount,bind,rw", str(folder)], check=True)
    outcomes["room again"] = _write(folder, 30)
    return outcomes


if __name__ == "__main__":
    place = Path(sys.argv[1])
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(place)]
    subprocess.run(mount, check=True)
    print(msgspec.json.encode(run(place)).decode())
