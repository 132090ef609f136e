"""A server and its clients where a stage does not end: the limit, signals, and what is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import ProtocolError, RemoteFault
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.server.servers import Server
from tests.support import tiny
from tests.support.endless import endless_bundle
from tests.support.event_loops import LOOPS, UVLOOP, make_environment
from tests.support.waits import skip_to, wait_for

BATCH = tiny.batch(0)
LARGE = tiny.batch(0, size=3000)
"""So large that its bytes tell its message from a greeting."""


@contextmanager
def serve(
    folder: Path, *options: str, loop: str = UVLOOP
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "splitonnx", "serve", str(folder), "--port", "0", *options]
    environment = make_environment(loop, folder.parent)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            yield process, "ws://" + line.split("ws://")[1].split(",")[0].strip()
        finally:
            process.kill()


def count_bytes_up(url: str) -> float:
    """Ask a server how many bytes of messages it has begun to act on."""
    with urllib.request.urlopen(url.replace("ws", "http", 1) + "/metrics", timeout=60) as response:
        text = response.read().decode()
    name = 'splitonnx_bytes_total{direction="up"}'
    return sum(float(row.split()[-1]) for row in text.splitlines() if row.startswith(name))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    made = endless_bundle()
    made.save(tmp_path / "bundle")
    return made


def test_a_stage_beyond_the_limit_is_told_to_its_client_and_the_server_lives() -> None:
    """On earlier versions the step runs until the server is killed, and stops nothing else."""
    bundle = endless_bundle()
    assert bundle.server is not None
    with Server(bundle.server, port=0, limits=Limits(stage_seconds=0.1)) as server:
        with (
            Client(bundle.client, server.url) as client,
            pytest.raises(RemoteFault, match=r"StageTooSlow: stage 'body.step' was ended"),
        ):
            client.step(BATCH)
        with Client(bundle.client, server.url) as client:
            (predicted,) = client.predict({"x": BATCH["x"]}).values()
    expected = tiny.reference_predict(tiny.reference_state(), BATCH["x"])
    np.testing.assert_allclose(predicted, expected, rtol=1e-5)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of its own")
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_step_that_does_not_end(
    bundle: Bundle, tmp_path: Path, number: int, loop: str
) -> None:
    """On earlier versions only SIGKILL does.  The client is told to come again."""
    caught: list[ProtocolError] = []

    def train(url: str) -> None:
        try:
            with Client(bundle.client, url, give_up_after=0.1) as client:
                client.step(LARGE)
        except ProtocolError as error:
            caught.append(error)

    serving = serve(tmp_path / "bundle" / "server", "--log-level", "debug", loop=loop)
    with serving as (process, url):
        assert process.stderr is not None
        thread = threading.Thread(target=train, args=(url,))
        thread.start()
        wait_for(lambda: count_bytes_up(url) >= LARGE["x"].nbytes)
        process.send_signal(number)
        skip_to(process.stderr, "stopping: ")
        process.send_signal(number)
        rest = process.stderr.read()
        code = process.wait(timeout=60)
        thread.join(timeout=60)
    assert "stopping at once" in rest
    assert "stopped" in rest.splitlines()[-1]
    assert code == 130
    assert not isinstance(caught[0], RemoteFault)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_ends_training_whose_own_stage_does_not_end(tmp_path: Path) -> None:
    """On earlier versions `splitonnx train` dies by SIGKILL alone."""
    made = endless_bundle("client")
    made.save(tmp_path / "bundle")
    np.savez(tmp_path / "data.npz", x=BATCH["x"], labels=BATCH["labels"])
    with serve(tmp_path / "bundle" / "server") as (_, url):
        command = [sys.executable, "-m", "splitonnx", "train", str(tmp_path / "bundle" / "client")]
        command += ["--server", url, "--data", str(tmp_path / "data.npz"), "--batch-size", "6"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                wait_for(lambda: count_bytes_up(url))  # its greeting: the first stage comes next
                begun = read_ticks(process.pid)
                # it is in its loop, and computes
                wait_for(lambda: read_ticks(process.pid) >= begun + 20)
                process.send_signal(signal.SIGINT)
                assert process.wait(timeout=60) == 130
            finally:
                process.kill()


def read_ticks(pid: int) -> int:
    """Read the processor time of a process, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
