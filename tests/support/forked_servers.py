"""Run by the JavaScript tests: ``splitonnx serve`` as often as asked, forked with all imports done.

    python -m tests.support.forked_servers

reads the words behind ``serve`` from each line of JSON on its standard input.  It prints
``started`` and the number of the process that serves, and ``ended`` and that number when it is no
more.  What servers log goes to the standard error that all have in common.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

from splitonnx import commands
from tests.support.session_kills import load_commands


def start(words: list[str]) -> None:
    """Fork a server, and a process that waits for its end."""
    if os.fork():
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    server = os.fork()
    if server == 0:
        _serve(words)
    os.write(1, f"started {server}\n".encode())
    os.waitpid(server, 0)
    os.write(1, f"ended {server}\n".encode())
    os._exit(0)


def _serve(words: list[str]) -> None:
    quiet = os.open(os.devnull, os.O_RDWR)
    os.dup2(quiet, 0)
    os.dup2(2, 1)  # the other one is for what is said of processes
    os.close(quiet)
    code = 1
    try:
        sys.argv = ["splitonnx", "serve", *words]
        commands.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        if code:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    load_commands(Path(__file__).parent)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
    for line in sys.stdin:
        start(json.loads(line))
