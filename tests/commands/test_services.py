"""serve and predict, run as a user runs them."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import splitonnx
from tests.support.commands import Command, start
from tests.support.interrupts import lose_interrupt, taking_interrupts


def test_a_port_in_use_is_one_line(
    command: Command, bundle: Path, url: str, tmp_path: Path
) -> None:
    port = url.rsplit(":", 1)[1]
    shutil.copytree(bundle / "server", tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    assert f"port {port}" in command.fail("serve", tmp_path / "copy", "--port", port)


def test_a_provider_that_is_not_there_is_one_line(command: Command, bundle: Path) -> None:
    error = command.fail("serve", bundle / "server", "--port", 0, "--provider", "npu")
    assert "choose cpu, cuda, openvino, coreml or dml" in error


def test_a_folder_in_use_is_one_line(command: Command, bundle: Path, url: str) -> None:
    assert "is in use by" in command.fail("serve", bundle / "server", "--port", 0)


def test_serve_says_where_and_stops_when_told(bundle: Path) -> None:
    process = start("serve", bundle / "server", "--port", 0)
    assert process.stderr is not None
    assert "serving on ws://127.0.0.1:" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped" in err.splitlines()[-1]


def test_an_interrupt_whose_exception_was_discarded_while_a_server_starts_ends_it(
    command: Command, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Starting(splitonnx.Server):
        def __init__(self, *_: object, **__: object) -> None:
            lose_interrupt()

        def serve_forever(self) -> None:
            pytest.fail("it serves")

    monkeypatch.setattr(splitonnx, "Server", Starting)
    with taking_interrupts():
        assert command("serve", bundle / "server", "--port", 0) == (130, "", "")


AS_ON_WINDOWS = """
import asyncio, sys
from splitonnx.commands import main

sys.modules["uvloop"] = None

def refuse(loop, number, *_):
    print("no handler for", int(number), file=sys.stderr, flush=True)
    raise NotImplementedError

asyncio.SelectorEventLoop.add_signal_handler = refuse
sys.argv[0] = "splitonnx"
main()
"""
"""An event loop as Windows has it: it takes no handlers of signals."""


def test_where_the_event_loop_takes_no_signal_handlers_a_signal_still_stops_the_server(
    bundle: Path,
) -> None:
    command = [sys.executable, "-c", AS_ON_WINDOWS, "serve", str(bundle / "server"), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = [process.stderr.readline() for _ in range(3)]
            assert lines[:2] == [f"no handler for {int(signal.SIGINT)}\n",
                                 f"no handler for {int(signal.SIGTERM)}\n"]  # fmt: skip
            assert "serving on ws://127.0.0.1:" in lines[2]
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "stopped" in err.splitlines()[-1]
