"""Registries of the tiny bundle's folder, and sessions brought to a step without training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.messages import Hello
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.policies.models import SessionExecutor
from splitonnx.runtime.server.policies.per_client import PerClient
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.server.sessions import Session
from splitonnx.runtime.wire.protocols import list_wires
from tests.support import tiny

ANN, BOB = "a" * 32, "b" * 32


def open_registry(folder: Path, **settings: object) -> Registry:
    party = PartyBundle.load(folder)
    return Registry(Executor(party, Engine(threads=1)), **settings)  # type: ignore[arg-type]


def greet(session: str, *, origin: str = "", start: int = 0, generation: int = 1) -> Hello:
    manifest = tiny.split_bundle().client.manifest
    return Hello(
        digest=manifest.digest,
        session=session,
        generation=generation,
        step=start,
        start=start,
        origin=origin,
        wires=list_wires(manifest),
    )


def find_executor(registry: Registry, session: Session) -> SessionExecutor:
    """Return what holds the state of a session's model."""
    assert isinstance(registry.policy, PerClient)
    return registry.policy.models[session.id].executor


def advance(registry: Registry, session: Session, step: int, value: float = 1.0) -> None:
    """Bring a session to a step without the work of training."""
    executor = find_executor(registry, session)
    executor.restore({n: np.full_like(a, value) for n, a in executor.state().items()}, step)
    session.ledger.step = step
