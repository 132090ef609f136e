"""A step whose micro-batches overlap equals the step whose micro-batches wait for each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost, UsageError
from splitonnx.names import Target
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import MemoryTransport
from splitonnx.runtime.server.dispatchers import Dispatcher
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.server.servers import Server
from tests.end_to_end.test_accumulated_steps import cut_zoo
from tests.support.zoo import ZOO

ROWS, STEPS, PARTS = 7, 2, 4
State = dict[str, np.ndarray]


class Delayed(MemoryTransport):
    """A connection whose server works only when the client waits, and that breaks as it is told."""

    def __init__(self, dispatcher: Dispatcher, breaks: Iterator[bool]) -> None:
        super().__init__(dispatcher)
        self._breaks = breaks

    def send(self, chunks: Sequence[Chunk]) -> None:
        if next(self._breaks, False):
            self.close()
            raise ConnectionLost("the server", "it was cut")
        super().send(chunks)

    def receive(self) -> bytes:
        if next(self._breaks, False):
            self.close()
            raise ConnectionLost("the server", "it was cut")
        return super().receive()


@contextmanager
def connect(bundle: Bundle, breaks: Iterable[bool] = ()) -> Iterator[tuple[Client, list[Delayed]]]:
    """Connect a client to a server in memory; it reconnects whenever its connection breaks."""
    assert bundle.server is not None
    registry = Registry(Executor(bundle.server, Engine(threads=1), renews=True))
    opened: list[Delayed] = []
    cuts = iter(breaks)

    def dial() -> Delayed:
        opened.append(Delayed(Dispatcher(registry), cuts))
        return opened[-1]

    with Client(bundle.client, dial, threads=1) as client:
        yield client, opened


def train(
    bundle: Bundle,
    name: str,
    breaks: Iterable[bool] = (),
    *,
    accumulate: int = 1,
    micro_batches: int = 1,
    in_flight: int = 3,
) -> State:
    """Train some steps, and return both parts' states."""
    with connect(bundle, breaks) as (client, opened):
        losses = [
            client.step(
                ZOO[name].data(ROWS, seed=seed),
                accumulate=accumulate,
                micro_batches=micro_batches,
                in_flight=in_flight,
            )["loss"]
            for seed in range(STEPS)
        ]
        opened[-1].drain()
        return {**client.state(), **opened[-1].executor.state(), "losses": np.array(losses)}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize("shape", ["vanilla", "U-shaped"])
@pytest.mark.parametrize("name", ZOO)
def test_overlapping_micro_batches_change_nothing(name: str, shape: str, target: Target) -> None:
    bundle = cut_zoo(name, shape, target)
    expected = train(bundle, name, accumulate=PARTS)
    assert_same(train(bundle, name, micro_batches=PARTS, in_flight=3), expected)


@pytest.mark.parametrize("in_flight", [1, 2, 16])
def test_any_number_in_flight_gives_the_same(in_flight: int) -> None:
    bundle = cut_zoo("batchnorm_trained", "U-shaped")
    expected = train(bundle, "batchnorm_trained", accumulate=PARTS)
    found = train(bundle, "batchnorm_trained", micro_batches=PARTS, in_flight=in_flight)
    assert_same(found, expected)


@pytest.mark.parametrize("shape", ["vanilla", "U-shaped"])
@pytest.mark.parametrize("after", range(4, 22, 3))
def test_a_connection_that_is_cut_in_the_middle_changes_nothing(shape: str, after: int) -> None:
    bundle = cut_zoo("dropout", shape)
    expected = train(bundle, "dropout", accumulate=PARTS)
    breaks = iter([False] * after + [True] + [False] * 7 + [True])
    found = train(bundle, "dropout", breaks, micro_batches=PARTS, in_flight=3)
    assert_same(found, expected)
    assert next(breaks, None) is None  # both cuts happened


def test_several_messages_are_under_way_at_once() -> None:
    bundle = cut_zoo("chain", "vanilla")
    sent: list[str] = []

    class Counting(Delayed):
        def send(self, chunks: Sequence[Chunk]) -> None:
            sent.append("sent")
            super().send(chunks)

        def receive(self) -> bytes:
            sent.append("received")
            return super().receive()

    assert bundle.server is not None
    registry = Registry(Executor(bundle.server, Engine(threads=1), renews=True))
    with Client(
        bundle.client, lambda: Counting(Dispatcher(registry), iter(())), threads=1
    ) as client:
        client.step(ZOO["chain"].data(8), micro_batches=4, in_flight=2)
        first = sent[4:]  # after two greetings
    assert first[:3] == ["sent", "sent", "received"]
    waiting = np.cumsum([1 if kind == "sent" else -1 for kind in first])
    assert waiting.max() == 2


def test_over_websockets_and_in_a_fit_it_is_the_same() -> None:
    bundle, data = cut_zoo("convolutions", "vanilla"), ZOO["convolutions"].data(24)
    assert bundle.server is not None
    states = []
    for accumulate, micro_batches in ((3, 1), (1, 3)):
        with (
            Server(bundle.server, port=0, threads=1) as server,
            Client(bundle.client, server.url, threads=1) as client,
        ):
            client.fit(
                data,
                epochs=2,
                batch_size=8,
                accumulate=accumulate,
                micro_batches=micro_batches,
                in_flight=2,
            )
            states.append(dict(client.state()))
    assert_same(states[1], states[0])


def test_both_ways_of_dividing_a_step_exclude_each_other() -> None:
    bundle = cut_zoo("chain", "whole")
    with Client(bundle.client, threads=1) as client, pytest.raises(UsageError, match="one of them"):
        client.step(ZOO["chain"].data(8), accumulate=2, micro_batches=2)


def test_a_whole_model_takes_micro_batches_one_after_the_other() -> None:
    bundle = cut_zoo("chain", "whole")
    states = []
    for accumulate, micro_batches in ((4, 1), (1, 4)):
        with Client(bundle.client, threads=1) as client:
            data = ZOO["chain"].data(8)
            client.step(data, accumulate=accumulate, micro_batches=micro_batches)
            states.append(dict(client.state()))
    assert_same(states[1], states[0])
