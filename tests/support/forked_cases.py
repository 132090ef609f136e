"""Run a module's ``main`` on many cases, in one process each that begins with all imports done.

``python -m tests.support.forked_cases MODULE`` reads the words of a case from each line of JSON,
forks a process that runs ``main`` with them as its command line, and prints what came of it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from tests.conftest import ROOT
from tests.support import forked_natives

Ended = subprocess.CompletedProcess[str]
Run = Callable[..., Ended]


@contextlib.contextmanager
def forking(module: str) -> Iterator[Run]:
    """Start the process that forks, and give a function from a case's words to its end."""
    if not hasattr(os, "fork"):  # Windows
        yield lambda *words: _start(module, *words)
        return
    command = [sys.executable, "-m", "tests.support.forked_cases", module]
    single = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # a process of several does not fork well
    with subprocess.Popen(
        command, cwd=ROOT, env=single, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        asks, answers = process.stdin, process.stdout
        assert asks is not None
        assert answers is not None

        def run(*words: str) -> Ended:
            print(json.dumps(words), file=asks, flush=True)
            code, printed, errors = json.loads(answers.readline())
            return subprocess.CompletedProcess(words, code, printed, errors)

        yield run
        asks.close()


def _start(module: str, *words: str) -> Ended:
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def _fork(main: Callable[[], None], words: list[str]) -> tuple[int, str, str]:
    """Run a case and return its exit code, what it printed and its errors."""
    with tempfile.TemporaryFile() as printed, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if child == 0:
            os.dup2(printed.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            sys.argv[1:] = words
            _run(main)
        _, status = os.waitpid(child, 0)
        printed.seek(0)
        errors.seek(0)
        told, failed = (file.read().decode(errors="replace") for file in (printed, errors))
        return os.waitstatus_to_exitcode(status), told, failed


def _run(main: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        with forked_natives.forking_natives():
            main()
        code = 0
    finally:
        if code:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    run_case = importlib.import_module(sys.argv[1]).main
    forked_natives.load()
    assert threading.active_count() == 1
    for line in sys.stdin:
        print(json.dumps(_fork(run_case, json.loads(line))), flush=True)
