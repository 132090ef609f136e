"""Train on a disk that fills up; run in a mount namespace of its own, as tests.full_disks is.

    unshare --map-root-user --mount python -m tests.full_disk_trainings FOLDER

Both parts lie on a file system of 1 MiB, which is full from the third step to the fifth, so that
the checkpoint after the fourth cannot be written.  What happened is printed as JSON.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import msgspec

from splitonnx.bundles import PartyBundle
from splitonnx.errors import NotSaved
from splitonnx.runtime.checkpoints import list_sessions
from splitonnx.runtime.clients import Client
from splitonnx.runtime.histories import StepRecord
from splitonnx.runtime.servers import Server
from tests import tiny
from tests.full_disks import DISK, fill

BATCH, STEPS, EVERY = 6, 6, 2


class Course(msgspec.Struct, kw_only=True):
    """A training on a disk that was full for a while: how it ended, and where both parts stand."""

    error: str
    steps_made: int
    is_equal: bool


def _train(folder: Path, filler: Path | None, when_unsaved: Literal["stop", "continue"]) -> Course:
    """Train, resuming what was broken off; fill the disk with ``filler`` for a while, if it is."""
    made: list[int] = []

    def note(record: StepRecord) -> None:
        made.append(record.step)
        if filler is not None and record.step == 3:
            fill(filler, left=0)
        if filler is not None and record.step == 5:
            filler.unlink()

    error = ""
    with (
        Server(folder / "server", port=0, threads=1, resume=True) as server,
        Client(folder / "client", server.url, threads=1, resume=True) as client,
    ):
        try:
            client.fit(
                tiny.batch(0, BATCH * STEPS),
                batch_size=BATCH,
                checkpoint_every=EVERY,
                when_unsaved=when_unsaved,
                on_step=note,
            )
            client.save()
        except NotSaved as failed:
            error = str(failed)
    return Course(error=error, steps_made=len(made), is_equal=False)


def _read(folder: Path) -> dict[str, bytes]:
    return {
        f"{name}/{tensor}": array.tobytes()
        for name in ("client", "server")
        for tensor, array in PartyBundle.load(folder / name).state().items()
    }


def run(disk: Path, elsewhere: Path) -> dict[str, Course]:
    tiny.split_bundle().save(elsewhere)
    _train(elsewhere, None, "stop")
    expected = _read(elsewhere)
    filler, courses = disk / "filler", {}
    for name in ("stop", "continue"):
        tiny.split_bundle().save(disk / name)
    courses["stop"] = _train(disk / "stop", filler, "stop")
    assert list_sessions(disk / "stop" / "client")
    filler.unlink()
    courses["resumed"] = _train(disk / "stop", None, "stop")
    courses["continue"] = _train(disk / "continue", filler, "continue")
    courses["resumed"].is_equal = _read(disk / "stop") == expected
    courses["continue"].is_equal = _read(disk / "continue") == expected
    return courses


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(place / "disk")]
    subprocess.run(mount, check=True)
    print(msgspec.json.encode(run(place / "disk", place / "elsewhere")).decode())
