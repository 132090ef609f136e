"""A bundle of the zoo, and a client linked to its server in memory."""

from __future__ import annotations

from splitonnx.bundles import Bundle
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from tests.support.zoo import ZOO


def make_bundle(name: str = "chain", at: str = "act1") -> Bundle:
    return cut(ZOO[name].build(), at=at, loss=ZOO[name].loss)


def link(bundle: Bundle) -> tuple[Client, Executor]:
    assert bundle.server is not None
    server = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    return Client(bundle.client, server, threads=1), server.executor
