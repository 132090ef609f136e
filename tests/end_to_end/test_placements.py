"""A session, its policy and the server's model give the same bits wherever they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import PartyBundle
from splitonnx.optimizers import AdamW
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import MemoryTransport
from splitonnx.runtime.server.dispatchers import Dispatcher
from splitonnx.runtime.server.operations.session_tables import list_sessions
from splitonnx.runtime.server.policies.policies import Policy
from splitonnx.runtime.server.registries import Registry
from tests.support.placements import placed_apart
from tests.support.zoo import ZOO

DATA = ZOO["dropout"].data(24)


def train(folder: Path, policy: Policy | None) -> dict[str, np.ndarray]:
    """Train three epochs with checkpoints, and return both parties' published states."""
    registry = Registry(Executor(PartyBundle.load(folder / "server"), Engine(1)), policy=policy)
    transport = MemoryTransport(Dispatcher(registry))
    with Client(folder / "client", transport, threads=1) as client:
        client.fit(DATA, epochs=3, batch_size=8, checkpoint_every=2, save=True)
        (one,) = list_sessions(registry, 0.0).sessions
        assert (one.session, one.step, one.version, one.is_saved) == (client.session, 9, 9, True)
    parties = [PartyBundle.load(folder / name) for name in ("client", "server")]
    assert [party.step for party in parties] == [9, 9]
    return {name: array for party in parties for name, array in party.state().items()}


@pytest.mark.parametrize("tail_at", [(), "flat"], ids=["vanilla", "U-shaped"])
def test_three_processes_train_the_bits_of_one(
    tmp_path: Path, tail_at: str | tuple[str, ...]
) -> None:
    bundle = cut(ZOO["dropout"].build(), at="r1", tail_at=tail_at, optimizer=AdamW(lr=1e-2))
    for name in ("together", "apart"):
        bundle.save(tmp_path / name)
    together = train(tmp_path / "together", None)
    with placed_apart(tmp_path / "apart" / "server") as policy:
        apart = train(tmp_path / "apart", policy)
    assert together.keys() == apart.keys()
    for name, array in together.items():
        assert array.tobytes() == apart[name].tobytes(), name
    untrained = bundle.server
    assert untrained is not None
    assert any((together[n] != array).any() for n, array in untrained.state().items())
