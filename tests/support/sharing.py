"""The tiny bundle with the phase in which clients share, and policies that join them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from splitonnx.bundles import Bundle
from splitonnx.messages import Hello, TaskKey
from splitonnx.names import SHARE
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.policies.model_makers import ModelMaker
from splitonnx.runtime.server.policies.tasks import Task
from splitonnx.runtime.wire.protocols import list_wires
from splitonnx.sharing import LEAVES, SAMPLES, declare_sharing, name_own
from tests.support import tiny


def sharing_bundle() -> Bundle:
    """Return the tiny bundle, which declares how its parameters are shared."""
    bundle = tiny.split_bundle()
    manifests = declare_sharing({n: p.manifest for n, p in bundle.parties.items()}, [])
    parties = {n: replace(p, manifest=manifests[n]) for n, p in bundle.parties.items()}
    return replace(bundle, parties=parties)


def source_of(bundle: Bundle) -> ModelMaker:
    """Return what makes the models of a bundle's sessions, in memory alone."""
    assert bundle.server is not None
    return ModelMaker(Executor(bundle.server, Engine(threads=1)), None, None)


def greet(bundle: Bundle, session: str) -> Hello:
    """Return the greeting of a client that permits sharing."""
    manifest = bundle.client.manifest
    return Hello(
        digest=manifest.digest, session=session, step=0, can_share=True, wires=list_wires(manifest)
    )


def share_task(session: str, step: int, value: float, *, samples: int = 0, leaves: int = 0) -> Task:
    """Return a client's share, all of whose weights have one value."""
    return Task(
        key=TaskKey(session, SHARE, step, 0),
        turn=0,
        seed=0,
        learning_rate=0.0,
        tensors={
            name_own("W1"): np.full((3, 4), value, np.float32),
            SAMPLES: np.array(samples),
            LEAVES: np.array(leaves),
        },
    )
