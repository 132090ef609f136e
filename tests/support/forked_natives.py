"""The process for native code, forked from one that has imported all that it imports.

:func:`forking_natives` spares a process that cuts one model most of what it computes.  That the
process starts as a fresh interpreter is for ``tests/partitioner/native/test_workers.py``.
"""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import os
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager
from unittest.mock import patch

from splitonnx.partitioner.native import main

_LOADED = ("onnxruntime", "onnxruntime.capi._pybind_state")
"""What the process imports at its first use; it starts no thread."""


def forking_natives() -> AbstractContextManager[object]:
    """Fork the process for native code during a ``with`` block."""
    return patch("splitonnx.partitioner.native.workers.subprocess.Popen", ForkedNatives)


def load() -> None:
    """Import what processes that are forked from this one would each import anew."""
    for name in _LOADED:
        importlib.import_module(name)


class ForkedNatives:
    """A running process for native code: what workers use of ``subprocess.Popen``."""

    def __init__(self, command: Sequence[str], **settings: object) -> None:
        assert command[-1] == main.__name__
        asked, asking = os.pipe()
        answered, answering = os.pipe()

        def serve() -> None:
            os.close(asking)  # else it would not notice that its caller has ended
            os.close(answered)
            quiet = os.open(os.devnull, os.O_WRONLY)
            for given, place in ((asked, 0), (answering, 1), (quiet, 2)):
                os.dup2(given, place)
                os.close(given)
            main.main()

        faulthandler.cancel_dump_traceback_later()  # pytest's, whose lock it would hold for good
        self._process = multiprocessing.get_context("fork").Process(target=serve)
        self._process.start()
        os.close(asked)
        os.close(answering)
        self.stdin, self.stdout = os.fdopen(asking, "wb"), os.fdopen(answered, "rb")
        self.returncode: int | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(main.__name__, timeout)
        return code

    def kill(self) -> None:
        self._process.kill()
