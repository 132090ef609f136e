"""A server that runs out of file descriptors: it says so in a line, and serves on."""

from __future__ import annotations

import resource
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from splitonnx.runtime.edge.descriptors import Rarely, find_ceiling, find_limit, raise_limit
from tests.support import arenas
from tests.support.arenas import Arena
from tests.support.event_loops import LOOPS

DESCRIPTORS = 64


@pytest.fixture
def scarce() -> Iterator[None]:
    """Let processes that begin now open so few files; this one keeps what it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))

    begin = partial(subprocess.Popen, preexec_fn=limit)
    with patch("tests.support.arenas.subprocess.Popen", begin), arenas.many_files(2000):
        yield
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (soft, hard)


@pytest.mark.parametrize("loop", LOOPS)
def test_200_connections_leave_a_server_of_64_descriptors_at_work(
    scarce: None, tmp_path: Path, loop: str
) -> None:
    arena = Arena(tmp_path, loop=loop)
    with ExitStack() as crowd:
        arena.expect_progress()
        for _ in range(3):
            for _ in range(200):
                crowd.enter_context(socket.create_connection(("127.0.0.1", arena.port)))
            arena.expect_progress()
    arena.close()
    assert arena.connections == 1
    assert "Traceback" not in arena.log
    lines = [line for line in arena.log.splitlines() if "descriptor" in line]
    assert 1 <= len(lines) <= 3, arena.log
    for name, array in arena.train_undisturbed().items():
        np.testing.assert_array_equal(arena.weights[name], array)


def test_a_line_comes_rarely_and_tells_how_often_it_was_due() -> None:
    times = iter([0.0, 1.0, 9.9, 10.0, 11.0, 30.0])
    rarely = Rarely(lambda: next(times), seconds=10.0)
    assert [rarely.count() for _ in range(6)] == [1, 0, 0, 3, 0, 2]


def test_some_descriptors_are_kept_for_files() -> None:
    assert 0 < find_limit() - find_ceiling() <= 32
    assert raise_limit(1) == find_limit()
