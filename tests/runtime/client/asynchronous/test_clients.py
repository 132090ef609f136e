"""The public client on a loop: opening, checks before anything is sent, and its own words."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from splitonnx import AsyncClient
from splitonnx.bundles import Bundle
from splitonnx.errors import (
    ArrayMismatch,
    BundleError,
    ConnectionLost,
    LocalProtocolError,
    NotFinite,
    UsageError,
)
from splitonnx.folder_locks import FolderLock
from splitonnx.runtime.channels.credentials import Credentials
from tests.support import tiny


async def be_away() -> object:
    raise ConnectionLost("the server", "it is away")


def test_a_client_is_opened_once_and_used_while_it_is_open() -> None:
    async def main() -> None:
        client = AsyncClient(tiny.local_bundle().client, threads=1)
        with pytest.raises(LocalProtocolError, match="async with"):
            await client.step(tiny.batch(0))
        with pytest.raises(LocalProtocolError, match="async with"):
            _ = client.steps
        async with client:
            await client.step(tiny.batch(0))
            assert client.steps == 1
            assert client.placement is None
            assert len(client.session) == 32
            assert client.terms.policy == "per-client"
            with pytest.raises(LocalProtocolError, match="opened once"):
                await client.open()
        await client.close()
        with pytest.raises(LocalProtocolError, match="client is closed"):
            await client.step(tiny.batch(0))
        assert (await client.state())["W1"].shape == (3, 4)
        unused = AsyncClient(tiny.local_bundle().client)
        await unused.close()
        with pytest.raises(LocalProtocolError, match="opened once"):
            await unused.open()

    asyncio.run(main())


def test_steps_and_predictions_are_numpy_s() -> None:
    async def main() -> None:
        reference = tiny.reference_state()
        async with AsyncClient(tiny.local_bundle().client, threads=1) as client:
            for seed in range(3):
                results = await client.step(tiny.batch(seed), learning_rate=lambda step: 0.1)
                expected = tiny.reference_step(reference, tiny.batch(seed))
                assert results["loss"] == pytest.approx(expected, 1e-5)
            x = tiny.batch(7, 5)["x"]
            outputs = await client.predict({"x": x}, batch_size=2)
            expected_outputs = tiny.reference_predict(reference, x)
            np.testing.assert_allclose(outputs["y"], expected_outputs, rtol=1e-4, atol=1e-5)

    asyncio.run(main())


def test_data_that_do_not_fit_stop_before_anything_is_sent_and_the_client_goes_on() -> None:
    async def main() -> None:
        bad = {**tiny.batch(0), "x": np.full((6, 3), np.nan, np.float32)}
        async with AsyncClient(tiny.local_bundle().client, threads=1) as client:
            with pytest.raises(NotFinite):
                await client.step(bad)
            with pytest.raises(ArrayMismatch):
                await client.step({**tiny.batch(0), "x": np.zeros((6, 4), np.float32)})
            with pytest.raises(UsageError, match="batch_size"):
                await client.predict({"x": tiny.batch(0)["x"]}, batch_size=0)
            with pytest.raises(NotFinite):
                await client.predict({"x": bad["x"]})
            await client.step(tiny.batch(0))
            assert client.steps == 1

    asyncio.run(main())


def test_what_cannot_be_opened_is_said() -> None:
    party, whole = tiny.split_bundle().client, tiny.local_bundle().client
    attempts = [
        (AsyncClient(party), UsageError, "name the server"),
        (AsyncClient(whole, "ws://127.0.0.1:1"), UsageError, "left whole"),
        (AsyncClient(whole, seed=-1), UsageError, "seed"),
        (AsyncClient(party, "http://127.0.0.1:1"), UsageError, "not a websocket address"),
        (AsyncClient(party, "ws://127.0.0.1:1"), ConnectionLost, "127.0.0.1:1"),
        (AsyncClient("no such folder", "ws://127.0.0.1:1"), BundleError, "no such folder"),
        (
            AsyncClient(party, be_away, credentials=Credentials()),  # type: ignore[arg-type]
            UsageError,
            "URL",
        ),
    ]
    for client, error, sentence in attempts:
        with pytest.raises(error, match=sentence):
            asyncio.run(client.open())


@pytest.mark.parametrize("way", ["refused", "cancelled", "closed"])
def test_a_client_that_was_not_opened_releases_its_folder(tmp_path: Path, way: str) -> None:
    tiny.split_bundle().save(tmp_path / "bundle")
    dials = asyncio.Event()

    async def dial() -> object:
        dials.set()
        if way == "refused":
            return await be_away()
        return await asyncio.Event().wait()

    async def main() -> None:
        client = AsyncClient(
            tmp_path / "bundle" / "client",
            dial,  # type: ignore[arg-type]
            resume=True,
            give_up_after=0.0,
        )
        opening = asyncio.create_task(client.open())
        await dials.wait()
        if way == "cancelled":
            opening.cancel()
        elif way == "closed":
            await client.close()
        with pytest.raises(
            {
                "refused": ConnectionLost,
                "cancelled": asyncio.CancelledError,
                "closed": LocalProtocolError,
            }[way]
        ):
            await opening
        FolderLock.acquire(tmp_path / "bundle" / "client").release()

    asyncio.run(main())


def test_saving_needs_a_folder_and_releases_it_after_an_error(tmp_path: Path) -> None:
    tiny.local_bundle().save(tmp_path / "bundle")

    async def main() -> None:
        async with AsyncClient(tiny.local_bundle().client, threads=1) as client:
            with pytest.raises(BundleError, match="memory"):
                await client.save()
        async with AsyncClient(tmp_path / "bundle" / "client", threads=1) as client:
            await client.step(tiny.batch(0))
            await client.save()
            state = await client.state()
        for name, array in Bundle.load(tmp_path / "bundle").client.state().items():
            np.testing.assert_array_equal(array, state[name])

    asyncio.run(main())


def test_it_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, splitonnx; assert 'asyncio' not in sys.modules;"
        "splitonnx.AsyncClient;"
        "assert not {'onnx', 'onnxruntime', 'prometheus_client', 'typer'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
