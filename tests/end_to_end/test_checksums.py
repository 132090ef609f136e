"""A bit that flips in a file at rest is noticed when the file is loaded, whichever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import BundleError, SplitonnxError
from splitonnx.manifests import PartyManifest, decode_manifest
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.exports import export
from splitonnx.runtime.server.servers import Server
from splitonnx.verifications import verify
from tests.support import tiny
from tests.support.bit_flips import flip, flips
from tests.support.zoo import ZOO

SESSION = "0123456789abcdef" * 2
DATA = ZOO["chain"].data(8)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny.split_bundle().save(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_an_altered_skeleton_is_noticed(saved: Path) -> None:
    for _ in flips(saved / "model.onnx"):
        with pytest.raises(BundleError, match=r"model\.onnx: it was altered"):
            Bundle.load(saved)


def test_bundles_and_states_of_earlier_versions_are_read_as_before(saved: Path) -> None:
    folder = saved / "client"
    older = (folder / "manifest.json").read_text().partition(',\n  "weights"')[0] + "\n}\n"
    assert "sha256" not in older
    (folder / "manifest.json").write_text(older)
    whole = (saved / "manifest.json").read_text().partition(',\n  "files"')[0] + "\n}\n"
    (saved / "manifest.json").write_text(whole)
    np.testing.assert_array_equal(Bundle.load(saved).client.weights["W1"], tiny.WEIGHTS["W1"])


def test_a_copy_is_written_with_the_checksums_of_what_it_holds(saved: Path, tmp_path: Path) -> None:
    client = Bundle.load(saved).client
    other = {name: array + 1 for name, array in client.weights.items()}
    replace(client, weights=other).save(tmp_path / "copy")
    np.testing.assert_array_equal(PartyBundle.load(tmp_path / "copy").weights["W1"], other["W1"])


def test_an_export_has_checksums_of_its_own(tmp_path: Path) -> None:
    cut(ZOO["chain"].build(), at="act1", client_target="portable").save(tmp_path / "bundle")
    export(tmp_path / "bundle" / "client", tmp_path / "mobile")
    flip(tmp_path / "mobile" / "weights.safetensors", -2)
    with pytest.raises(BundleError, match="altered"):
        PartyBundle.load(tmp_path / "mobile")
    flip(tmp_path / "bundle" / "client" / "weights.safetensors", -2)
    with pytest.raises(BundleError, match="altered"):
        export(tmp_path / "bundle" / "client", tmp_path / "another")


def test_no_use_of_a_bundle_goes_on_with_altered_weights(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    cut(ZOO["chain"].build(), at="act1").save(folder)
    with Server(folder / "server", port=0, threads=1, client=folder / "client") as server:
        address = server.url.replace("ws", "http", 1) + "/client/manifest.json"
        with urlopen(address, timeout=60) as response:
            given = decode_manifest(response.read(), PartyManifest, address)
        assert given.weights == PartyBundle.load(folder / "client").manifest.weights
        flip(folder / "client" / "weights.safetensors", -2)
        uses: list[Callable[[], object]] = [
            lambda: Client(folder / "client", server.url),
            lambda: merge(folder),
            lambda: verify(folder, DATA),
        ]
        for use in uses:
            with pytest.raises(SplitonnxError, match="altered"):
                use()
    with pytest.raises(SplitonnxError, match="altered"):
        Server(folder / "server", port=0, client=folder / "client")
    flip(folder / "server" / "weights.safetensors", -2)
    for _ in range(2):  # the first leaves the folder free
        with pytest.raises(SplitonnxError, match="altered"):
            Server(folder / "server", port=0)
