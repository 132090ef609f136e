"""What the connections of a server share, without a server: for tests of what one of them does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from splitonnx.bundles import Bundle
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.scheduling.turns import Turns
from splitonnx.runtime.server.contexts import ServerContext
from splitonnx.runtime.server.metrics import Metrics
from splitonnx.runtime.server.registries import Registry


@contextmanager
def open_context(bundle: Bundle) -> Iterator[ServerContext]:
    """Share a registry and turns of one thread each, while the context lasts."""
    assert bundle.server is not None
    compute, storage = Turns(1), Turns(1)
    yield ServerContext(
        registry=Registry(Executor(bundle.server, Engine(threads=1))),
        compute=compute,
        storage=storage,
        metrics=Metrics([phase.name for phase in bundle.server.manifest.phases]),
        stop=asyncio.Event(),
    )
    compute.close()
    storage.close()
