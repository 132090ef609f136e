"""serve and predict, run as a user runs them."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

from tests.support.commands import Command, start


def test_a_port_in_use_is_one_line(
    command: Command, bundle: Path, url: str, tmp_path: Path
) -> None:
    port = url.rsplit(":", 1)[1]
    shutil.copytree(bundle / "server", tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    assert f"port {port}" in command.fail("serve", tmp_path / "copy", "--port", port)


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
