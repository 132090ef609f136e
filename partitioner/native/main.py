"""Run native code for another process, which asks for it: ``python -m`` this module.

:mod:`workers` starts this process and asks; the functions that are called are in :mod:`natives`.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import traceback
from contextlib import suppress
from typing import BinaryIO

import msgspec

from splitonnx.partitioner.native.natives import NATIVES, import_onnxruntime
from splitonnx.partitioner.native.requests import SECONDS, RequestReader, read_frame, write_frame

BASE_BYTES = 4 << 30
"""Extra address space for every request, beyond the space that the process uses already."""
BYTES_PER_BYTE = 64
"""Extra address space per byte of the request and of what is kept for it.

Graphs need more memory than their bytes.
"""
MISTAKES = frozenset({"AttributeError", "NameError", "TypeError", "UnboundLocalError"})
"""Names of exceptions that indicate a bug in the code, not an invalid model."""


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Process the requests from ``source`` one after the other, until ``source`` ends.

    The responses are written to ``sink``.
    """
    reader = RequestReader()
    write_frame(sink, b"")  # ready
    while True:
        try:
            request = read_frame(source)
        except EOFError:
            return
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        _limit_memory(len(request) + reader.kept_bytes)
        answer = _answer(reader, request)
        faulthandler.cancel_dump_traceback_later()
        write_frame(sink, answer)


def _limit_memory(size: int) -> None:
    """Limit the memory for a request of ``size`` bytes, if the system supports it (Linux).

    macOS accepts the limit but does not enforce it; Windows has no such limit.
    """
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = taken + BASE_BYTES + BYTES_PER_BYTE * size
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (ImportError, OSError, ValueError):
        return


def _answer(reader: RequestReader, request: bytes) -> bytes:
    """Call the requested function and return its result, or a description of its exception.

    If the exception indicates a bug, the description contains the traceback.
    """
    try:
        name, arguments = reader.read(request)
        return msgspec.msgpack.encode([NATIVES[name][0](*arguments)])
    except Exception as error:  # noqa: BLE001
        kind, told = type(error).__name__, [str(error)]
        if kind in MISTAKES:
            told.append("".join(traceback.format_exception(error)))
        texts = (text.encode(errors="replace").decode() for text in told)
        return msgspec.msgpack.encode([kind, *texts])


def main() -> None:
    """Process requests from the parent process until it closes this process's standard input.

    Requests are read from standard input, and responses are written to standard output.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no core file
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # native code's prints must not reach the pipe
    with suppress(ImportError):  # a function that needs it says that it is missing
        import_onnxruntime()
    serve(source, sink)


if __name__ == "__main__":
    main()
    os._exit(0)  # the parent waits for the end; a clean one takes as long as the imports
