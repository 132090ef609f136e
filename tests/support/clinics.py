"""A server of two owners whose stages run in workers, for tests of those."""

from __future__ import annotations

import os
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.edge.tokens import Tokens, add_token
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.server.ledgers import Ledger
from splitonnx.runtime.server.servers import Server
from splitonnx.runtime.workers.processes import Worker, WorkerOptions
from tests.support.zoo import ZOO

DATA = ZOO["chain"].data(48)

OWNERS = ("ana", "ben")

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@dataclass(kw_only=True)
class Clinic:
    """A server with two owners' tokens."""

    server: Server
    tokens: dict[str, str] = field(repr=False)
    committed: threading.Condition = field(repr=False)
    """Notified of each step that a session of this process has made."""

    def credentials(self, owner: str) -> Credentials:
        return Credentials(token=self.tokens[owner])

    def worker(self, owner: str) -> Worker:
        """Find an owner's worker."""
        pool = self.server._workers
        assert pool is not None
        return pool._leases[f"owner {owner}"].get_worker()

    def end_worker(self, owner: str, step: int, number: int) -> None:
        """End an owner's worker once it has made a step; the client knows the loss before that."""
        (session,) = (s for s in self.server._registry.sessions if s.owner == owner)
        with self.committed:
            self.committed.wait_for(lambda: session.ledger.step >= step)
        worker = self.worker(owner)
        os.kill(worker.pid, number)
        worker._process.wait()

    def count_deaths(self) -> float:
        request = urllib.request.Request(
            self.server.url.replace("ws", "http", 1) + "/metrics",
            headers={"Authorization": f"Bearer {self.tokens['ana']}"},
        )
        with urllib.request.urlopen(request) as response:
            lines = response.read().decode().splitlines()
        (line,) = (row for row in lines if row.startswith("splitonnx_worker_deaths_total "))
        return float(line.split()[1])


@contextmanager
def open_clinic(served: object, folder: Path, limits: Limits | None = None) -> Iterator[Clinic]:
    tokens = {owner: add_token(folder / "tokens", owner) for owner in OWNERS}
    known = Tokens.read(folder / "tokens")
    committed, commit = threading.Condition(), Ledger.commit

    def commit_and_tell(ledger: Ledger) -> None:
        commit(ledger)
        with committed:
            committed.notify_all()

    with (
        patch.object(Ledger, "commit", commit_and_tell),
        Server(served, port=0, tokens=known, limits=limits) as server,  # type: ignore[arg-type]
    ):
        yield Clinic(server=server, tokens=tokens, committed=committed)


def check_equal(state: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        np.testing.assert_array_equal(state[name], array)


def train_in_process(bundle: Bundle) -> dict[str, np.ndarray]:
    """Train on ``DATA`` with stages in the server's own process; return the client's state."""
    assert bundle.server is not None
    with (
        Server(bundle.server, port=0, isolate=False) as server,
        Client(bundle.client, server.url) as client,
    ):
        client.fit(DATA, batch_size=8)
        return client.state()


def make_options(party: PartyBundle) -> WorkerOptions:
    return WorkerOptions(
        party=party, threads=1, provider="cpu", stage_seconds=60.0, memory_bytes=None, kept_bytes=0
    )
