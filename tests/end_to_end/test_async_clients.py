"""A client on an event loop trains as the waiting client does, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitonnx import AsyncClient, Client, Server
from splitonnx.bundles import Bundle
from splitonnx.codecs import Chunk
from splitonnx.messages import Tensors, decode_message
from splitonnx.runtime.channels.asynchronous.websockets import AsyncWebSocketTransport
from tests.conftest import ROOT
from tests.end_to_end.test_accumulated_steps import cut_zoo
from tests.end_to_end.test_readme import list_blocks
from tests.support.echoes import PATIENCE
from tests.support.zoo import ZOO

ROWS, STEPS, PARTS = 7, 2, 4
State = dict[str, np.ndarray]
DIVISIONS: Mapping[str, dict[str, int]] = {
    "one by one": {},
    "accumulate": {"accumulate": PARTS},
    "micro-batches": {"micro_batches": PARTS, "in_flight": 3},
}


@contextmanager
def serving(bundle: Bundle) -> Iterator[Server]:
    assert bundle.server is not None
    with Server(bundle.server, port=0, threads=1) as server:
        yield server


def list_batches(name: str) -> list[dict[str, np.ndarray]]:
    return [ZOO[name].data(ROWS, seed=seed) for seed in range(STEPS)]


def train(bundle: Bundle, name: str, division: str) -> tuple[State, State]:
    """Train some steps with the waiting client; return its state and losses, and predictions."""
    with serving(bundle) as server, Client(bundle.client, server.url, threads=1) as client:
        losses = [client.step(batch, **DIVISIONS[division])["loss"] for batch in list_batches(name)]
        outputs = client.predict(select_inputs(bundle, name), batch_size=3)
        return {**client.state(), "losses": np.array(losses)}, outputs


def select_inputs(bundle: Bundle, name: str) -> dict[str, np.ndarray]:
    data = ZOO[name].data(ROWS)
    return {spec.name: data[spec.name] for spec in bundle.client.manifest.phase("predict").data}


async def train_async(
    bundle: Bundle, name: str, division: str, server: object
) -> tuple[State, State]:
    async with AsyncClient(bundle.client, server, threads=1) as client:  # type: ignore[arg-type]
        losses = [
            (await client.step(batch, **DIVISIONS[division]))["loss"]
            for batch in list_batches(name)
        ]
        outputs = await client.predict(select_inputs(bundle, name), batch_size=3)
        return {**await client.state(), "losses": np.array(losses)}, outputs


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("division", DIVISIONS)
@pytest.mark.parametrize("shape", ["vanilla", "U-shaped"])
@pytest.mark.parametrize("name", ["dropout", "batchnorm_trained"])
def test_steps_and_predictions_equal_those_of_the_waiting_client(
    name: str, shape: str, division: str
) -> None:
    bundle = cut_zoo(name, shape)
    expected, outputs = train(bundle, name, division)
    with serving(bundle) as server:
        found, predicted = asyncio.run(train_async(bundle, name, division, server.url))
    assert_same(found, expected)
    assert_same(predicted, outputs)


def test_on_uvloop_it_is_the_same() -> None:
    uvloop = pytest.importorskip("uvloop", reason="it has no wheel for this platform")
    bundle = cut_zoo("convolutions", "U-shaped")
    expected, outputs = train(bundle, "convolutions", "micro-batches")
    with serving(bundle) as server:
        found, predicted = uvloop.run(
            train_async(bundle, "convolutions", "micro-batches", server.url)
        )
    assert_same(found, expected)
    assert_same(predicted, outputs)


@pytest.mark.parametrize("division", DIVISIONS)
def test_connections_that_are_cut_in_the_middle_change_nothing(division: str) -> None:
    bundle = cut_zoo("dropout", "U-shaped")
    expected, _ = train(bundle, "dropout", division)
    cuts = 0

    class Cut(AsyncWebSocketTransport):
        """A connection that ends by itself after so many messages each way."""

        left = 4

        async def send(self, chunks: Sequence[Chunk]) -> None:
            self.count()
            await super().send(chunks)

        async def receive(self) -> Chunk | bytearray:
            content = await super().receive()
            self.count()
            return content

        def count(self) -> None:
            nonlocal cuts
            self.left -= 1
            if not self.left:
                cuts += 1
                self.abort()

    with serving(bundle) as server:

        async def dial() -> AsyncWebSocketTransport:
            Cut.left += 1  # in the end there is time enough for a whole step
            return await Cut.open(server.url)

        found, _ = asyncio.run(train_async(bundle, "dropout", division, dial))
    assert cuts >= 3
    assert_same(found, expected)


def test_two_clients_train_at_once_on_one_loop() -> None:
    names = ["convolutions", "dropout"]
    bundles = [cut_zoo(name, "vanilla") for name in names]
    expected = [
        train(bundle, name, "micro-batches")[0] for bundle, name in zip(bundles, names, strict=True)
    ]

    async def train_both(servers: list[Server]) -> list[tuple[State, State]]:
        return await asyncio.gather(
            *(
                train_async(bundle, name, "micro-batches", server.url)
                for bundle, name, server in zip(bundles, names, servers, strict=True)
            )
        )

    with serving(bundles[0]) as first, serving(bundles[1]) as second:
        both = asyncio.run(train_both([first, second]))
    for (found, _), own in zip(both, expected, strict=True):
        assert_same(found, own)


def test_several_micro_batches_are_under_way_at_once() -> None:
    bundle, batch = cut_zoo("chain", "vanilla"), ZOO["chain"].data(ROWS)

    async def train_late(url: str) -> None:
        both_sent = asyncio.Event()

        class Late(AsyncWebSocketTransport):
            """A connection whose replies to tasks come when the second task's message was sent."""

            tensors = 0

            async def send(self, chunks: Sequence[Chunk]) -> None:
                await super().send(chunks)
                self.tensors += isinstance(decode_message(b"".join(chunks))[0], Tensors)
                if self.tensors == 2:
                    both_sent.set()

            async def receive(self) -> Chunk | bytearray:
                content = await super().receive()
                if isinstance(decode_message(content)[0], Tensors):
                    await both_sent.wait()
                return content

        async with AsyncClient(bundle.client, partial(Late.open, url), threads=1) as client:
            async with asyncio.timeout(PATIENCE):
                await client.step(batch, micro_batches=PARTS, in_flight=2)
            assert client.steps == 1

    with serving(bundle) as server:
        asyncio.run(train_late(server.url))


def test_calls_at_once_run_in_their_order() -> None:
    bundle, name = cut_zoo("dropout", "vanilla"), "dropout"
    expected, _ = train(bundle, name, "one by one")

    async def run(url: str) -> State:
        async with AsyncClient(bundle.client, url, threads=1) as client:
            waiting = asyncio.create_task(client.predict(select_inputs(bundle, name)))
            steps = [client.step(batch) for batch in list_batches(name)]
            given_up = asyncio.create_task(client.step(ZOO[name].data(ROWS)))
            running = asyncio.gather(*steps)
            await asyncio.gather(waiting, cancel_soon(given_up))
            losses = [result["loss"] for result in await running]
            return {**await client.state(), "losses": np.array(losses)}

    async def cancel_soon(task: asyncio.Task[State]) -> None:
        await asyncio.sleep(0)  # it waits for its turn now
        task.cancel()

    with serving(bundle) as server:
        assert_same(asyncio.run(run(server.url)), expected)


def test_evaluations_and_saved_states_equal_those_of_the_waiting_client(tmp_path: Path) -> None:
    bundle, name = cut_zoo("convolutions", "U-shaped"), "convolutions"
    data = ZOO[name].data(ROWS)

    async def run(folder: Path, url: str) -> dict[str, float]:
        async with AsyncClient(folder / "client", url, threads=1) as client:
            await client.step(data)
            found = await client.evaluate(data, batch_size=3)
            await client.save()
            return found

    def run_waiting(folder: Path, url: str) -> dict[str, float]:
        with Client(folder / "client", url, threads=1) as client:
            client.step(data)
            found = client.evaluate(data, batch_size=3)
            client.save()
            return found

    numbers, states = [], []
    for number, play in enumerate([run_waiting, lambda *args: asyncio.run(run(*args))]):
        folder = tmp_path / str(number)
        bundle.save(folder)
        with Server(folder / "server", port=0, threads=1) as server:
            numbers.append(play(folder, server.url))
        parties = Bundle.load(folder).parties.values()
        assert {party.step for party in parties} == {1}
        states.append({name: a for party in parties for name, a in party.state().items()})
    assert numbers[0] == numbers[1]
    assert_same(states[1], states[0])


def test_a_whole_model_trains_without_a_server_and_batches_come_one_by_one() -> None:
    bundle, name = cut_zoo("dropout", "whole"), "dropout"
    inputs = select_inputs(bundle, name)
    with Client(bundle.client, threads=1) as waiting:
        expected = [waiting.step(batch)["loss"] for batch in list_batches(name)]
        outputs = list(waiting.predict_batches(inputs, batch_size=3))

    async def run() -> None:
        async with AsyncClient(bundle.client, threads=1) as client:
            losses = [(await client.step(batch))["loss"] for batch in list_batches(name)]
            assert losses == expected
            found = [batch async for batch in client.predict_batches(inputs, batch_size=3)]
            assert len(found) == len(outputs) == 3
            for one, other in zip(found, outputs, strict=True):
                assert_same(one, other)

    asyncio.run(run())


def test_the_page_s_program_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cut_zoo("convolutions", "vanilla").save("bundle")
    (block,) = list_blocks(ROOT / "docs" / "asyncio.md", "python")
    program: dict[str, Any] = {}
    exec(compile(block, "docs/asyncio.md", "exec"), program)
    batches = list_batches("convolutions")
    with Server("bundle/server", port=0, threads=1) as server:
        found = asyncio.run(program["train"](server.url, batches))
        with Client("bundle/client", server.url, threads=1) as client:
            assert client.steps == STEPS
            assert client.evaluate(batches[0]) == found
