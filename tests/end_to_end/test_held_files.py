"""Files that are cut short in place while a server has them: it goes on with what it has read."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.server.servers import Server
from splitonnx.runtime.storage.archives import Archive
from splitonnx.states import STATE
from tests.end_to_end.test_stopping import serve
from tests.support.zoo import ZOO

DATA = ZOO["chain"].data(48)
WEIGHTS = "weights.safetensors"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="open files cannot be cut there")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


@pytest.fixture
def trained(bundle: Bundle, tmp_path: Path) -> Path:
    """A bundle's folder with an outcome of one training."""
    bundle.save(tmp_path / "bundle")
    with (
        Server(tmp_path / "bundle" / "server", port=0) as server,
        Client(tmp_path / "bundle" / "client", server.url) as client,
    ):
        client.fit(DATA, batch_size=8)
        client.save()
    return tmp_path / "bundle"


def read_all(arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


def test_what_is_held_stays_whatever_becomes_of_its_file(trained: Path) -> None:
    folder = trained / "server"
    party = PartyBundle.load(folder, is_held=True)
    archive = Archive(folder, party.manifest)
    outcome = archive.find_tensors(party.session, party.step, "")
    assert outcome is not None
    before = [read_all(dict(arrays)) for arrays in (party.weights, party.state(), outcome)]
    for name in (WEIGHTS, STATE):
        os.truncate(folder / name, 0)
    after = [read_all(dict(arrays)) for arrays in (party.weights, party.state(), outcome)]
    assert after == before


@pytest.mark.parametrize("mode", ["--isolate", "--no-isolate"])
def test_a_server_goes_on_though_its_files_are_cut_short(trained: Path, mode: str) -> None:
    """On earlier versions SIGBUS ends it, with every session, or no worker can be started."""
    client = PartyBundle.load(trained / "client", is_held=True)
    with serve(trained / "server", mode, "--client", str(trained / "client")) as (process, url):
        page = url.replace("ws", "http", 1)
        with urlopen(f"{page}/client/{WEIGHTS}") as response:
            given = response.read()
        for party in ("server", "client"):
            for name in (WEIGHTS, STATE):
                os.truncate(trained / party / name, 0)
        with urlopen(f"{page}/client/{WEIGHTS}") as response:
            assert response.read() == given
        with Client(client, url) as once_more:
            once_more.step({name: array[:8] for name, array in DATA.items()})
        with pytest.raises(Exception, match="weights"):
            PartyBundle.load(trained / "client")
        assert process.poll() is None
