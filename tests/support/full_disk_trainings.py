"""Train on a disk that fills up; run in a mount namespace of its own, as full_disks is.

    unshare --map-root-user --mount python -m tests.support.full_disk_trainings FOLDER

Both parts lie on a file system of 1 MiB, which is full from the third step to the fifth, so that
the checkpoint after the fourth cannot be written; or the client's alone does, and the disk fills up
before the end.  What happened is printed as JSON.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import msgspec

from splitonnx.bundles import PartyBundle
from splitonnx.errors import BundleError, NotSaved
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.histories import StepRecord
from splitonnx.runtime.server.servers import Server
from tests.support import tiny
from tests.support.full_disks import DISK, fill

BATCH, STEPS, EVERY = 6, 6, 2


class Course(msgspec.Struct, kw_only=True):
    """A training on a disk that was full for a while: how it ended, and where both parts stand."""

    error: str
    steps_made: int
    is_equal: bool


def _train(
    folder: Path,
    server: Server,
    filler: Path,
    full: tuple[int, int] | None = None,
    when_unsaved: Literal["stop", "continue"] = "stop",
) -> Course:
    """Train, resuming what was interrupted; fill the disk from one step to another, if asked."""
    made: list[int] = []

    def note(record: StepRecord) -> None:
        made.append(record.step)
        if full is not None and record.step == full[0]:
            fill(filler, left=0)
        if full is not None and record.step == full[1]:
            filler.unlink()

    error = ""
    with Client(folder / "client", server.url, threads=1, resume=True) as client:
        try:
            client.fit(
                tiny.batch(0, BATCH * STEPS),
                batch_size=BATCH,
                checkpoint_every=EVERY,
                when_unsaved=when_unsaved,
                on_step=note,
            )
            client.save()
        except (NotSaved, BundleError) as failed:
            error = str(failed)
    return Course(error=error, steps_made=len(made), is_equal=False)


def _serve(folder: Path) -> Server:
    return Server(folder / "server", port=0, threads=1, resume=True)


def _read(client: Path, server: Path) -> dict[str, bytes]:
    return {
        f"{part.name}/{tensor}": array.tobytes()
        for part in (client / "client", server / "server")
        for tensor, array in PartyBundle.load(part).state().items()
    }


def run(disk: Path, elsewhere: Path) -> dict[str, Course]:
    filler = disk / "filler"
    calm, other, stop, going_on, end = places = [
        *(elsewhere / name for name in ("calm", "other")),
        *(disk / name for name in ("stop", "continue", "end")),
    ]
    for place in places:
        tiny.split_bundle().save(place)
    courses = {}
    with _serve(calm) as server:
        courses["calm"] = _train(calm, server, filler)
    with _serve(stop) as server:
        courses["stop"] = _train(stop, server, filler, full=(3, 5))
    filler.unlink()
    with _serve(stop) as server:
        courses["stop, resumed"] = _train(stop, server, filler)
    with _serve(going_on) as server:
        courses["continue"] = _train(going_on, server, filler, (3, 5), "continue")
    with _serve(other) as server:  # its disk has room, and it lasts
        courses["end"] = _train(end, server, filler, (5, 0), "continue")
        filler.unlink()
        courses["end, resumed"] = _train(end, server, filler)
    expected = _read(calm, calm)
    for name, client, party in (
        ("stop, resumed", stop, stop),
        ("continue", going_on, going_on),
        ("end, resumed", end, other),
    ):
        courses[name].is_equal = _read(client, party) == expected
    return courses


if __name__ == "__main__":
    place = Path(sys.argv[1])
    (place / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(place / "disk")]
    subprocess.run(mount, check=True)
    print(msgspec.json.encode(run(place / "disk", place / "elsewhere")).decode())
