"""The command line on bad models: each run in a forked process with limits on time and memory.

The process for native code is forked from that one in turn, for starting and importing would be
most of the work.

``python -m tests.fuzzing.screenings FOLDER`` runs ``cut`` and ``inspect`` on the model in every
folder inside FOLDER and prints what came of each, one line of JSON a run.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path

from splitonnx.commands import app, main
from splitonnx.errors import SplitonnxError
from splitonnx.partitioner import partitions
from splitonnx.partitioner.reports import inspections
from tests.support import forked_natives

_SECONDS = 60
_PROCESSOR_SECONDS = 30
"""Beyond either, the system ends the process, and its exit code says so."""
_MEMORY = 2 << 30
_CUT = ("--at", "act1", "--loss", "mse", "--send-labels")


def load(folder: Path) -> None:
    """Import what the forked processes would each import anew."""
    assert inspections
    assert partitions
    forked_natives.load()
    missing = str(folder / "missing")
    for words in (["cut", missing, *_CUT, "-o", missing], ["inspect", missing]):
        with suppress(SplitonnxError):  # what reads the words is loaded by its first use
            app(words, standalone_mode=False)


def screen(folder: Path, command: str, *options: str) -> dict[str, object]:
    """Run a command on ``folder``'s model in a process of its own and say what came of it."""
    errors, printed = folder.parent / "errors", folder.parent / "printed"
    before = sorted(os.listdir(folder))
    child = os.fork()
    if child == 0:
        _run(folder, errors, printed, [command, str(folder / "model.onnx"), *options])
    _, status, usage = os.wait4(child, 0)
    return {
        "name": folder.name,
        "command": command,
        "code": os.waitstatus_to_exitcode(status),
        "errors": errors.read_text(errors="replace"),
        "printed": printed.read_text(errors="replace"),
        "written": sorted(set(os.listdir(folder)) - set(before)),
        "megabytes": usage.ru_maxrss / 1024,
    }


def _run(folder: Path, errors: Path, printed: Path, arguments: list[str]) -> None:
    """Be the command line; never return."""
    code = 70
    try:
        for path, descriptor in ((printed, 1), (errors, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + _MEMORY, taken + _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (_PROCESSOR_SECONDS, _PROCESSOR_SECONDS))
        signal.alarm(_SECONDS)
        os.chdir(folder)
        sys.argv = ["splitonnx", *arguments]
        with forked_natives.forking_natives():
            main()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 70
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    load(Path(sys.argv[1]))
    for path in sorted(Path(sys.argv[1]).iterdir()):
        if path.is_dir():
            output = str(path / "bundle")
            print(json.dumps(screen(path, "cut", *_CUT, "-o", output)), flush=True)
            print(json.dumps(screen(path, "inspect")), flush=True)
