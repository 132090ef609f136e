"""A real server takes several micro-batches at once, also with stages in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.optimizers import AdamW
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.estimates import Estimates
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.server.servers import Server
from tests.support.windows import SocketClient, WindowedClient, make_calm_steps
from tests.support.zoo import ZOO

PARTS, ROWS = 5, 11
BATCHES = [ZOO["batchnorm_trained"].data(ROWS, seed=seed) for seed in range(3)]
MOST = 3


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    optimizer = AdamW(lr=1e-2, clip_norm=1.0)
    return cut(ZOO["batchnorm_trained"].build(), at="c1", tail_at="r2", optimizer=optimizer)


@pytest.fixture(scope="module")
def expected(bundle: Bundle) -> Mapping[str, np.ndarray]:
    """The client's state after training without a network, one micro-batch after the other."""
    assert bundle.server is not None
    registry = Registry(Executor(bundle.server, Engine(threads=1)))
    client = WindowedClient(registry, Executor(bundle.client, Engine(threads=1)), 1)
    make_calm_steps(client, BATCHES, PARTS)
    return client.executor.state()


@pytest.fixture(scope="module", params=[True, False], ids=["isolated", "in the server"])
def server(bundle: Bundle, request: pytest.FixtureRequest) -> Iterator[Server]:
    assert bundle.server is not None
    estimates = Estimates(bundle.server.manifest, bundle.server.graphs)
    needed = estimates.measure("accumulate", {"N": -(-ROWS // PARTS)})
    limits = Limits(task_bytes=2 * MOST * needed)
    with Server(bundle.server, port=0, isolate=request.param, limits=limits) as server:
        yield server


def take_steps(client: SocketClient, *, cut_at: int = -1) -> None:
    """Have as many open as may be; lose the connection once, when so many replies came."""
    replies = 0
    for batch in BATCHES:
        client.begin_step(batch, PARTS)
        while not client.is_done:
            while client.can_begin or client.up:
                if client.can_begin:
                    client.begin()
                while client.up:
                    client.handle_up()
            client.handle_down()
            replies += 1
            if replies == cut_at:
                client.connect()


@pytest.mark.parametrize("cut_at", [-1, 1, 4, 7, 12])
def test_what_overlaps_gives_the_bits_of_what_does_not(
    bundle: Bundle, expected: Mapping[str, np.ndarray], server: Server, cut_at: int
) -> None:
    executor = Executor(bundle.client, Engine(threads=1))
    client = SocketClient(server.url, executor, MOST, f"{cut_at + 1:032x}")
    assert client.in_flight == MOST
    take_steps(client, cut_at=cut_at)
    client.close()
    for name, array in expected.items():
        np.testing.assert_array_equal(executor.state()[name], array, err_msg=name)
