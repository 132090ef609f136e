"""The client's part as a server gives it: its files, to those who may come in, and no other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec
import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.codecs import decode_tensors
from splitonnx.errors import UsageError
from splitonnx.manifests import PartyManifest, decode_manifest
from splitonnx.runtime.edge.client_files import ClientFiles
from splitonnx.runtime.edge.tokens import Identity, Tokens
from splitonnx.runtime.server.servers import Server
from tests.support import tiny

TOKEN = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    tiny.split_bundle().save(tmp_path / "bundle")
    return Bundle.load(tmp_path / "bundle")


def fetch(server: Server, path: str, headers: Mapping[str, str] | None = None) -> bytes:
    url = server.url.replace("ws", "http", 1) + path
    with urlopen(Request(url, headers=dict(headers or {})), timeout=60) as response:
        content: bytes = response.read()
    return content


def status(server: Server, path: str, headers: Mapping[str, str] | None = None) -> int:
    try:
        fetch(server, path, headers)
    except HTTPError as error:
        with error:
            return error.code
    return 200


def test_every_file_of_the_part_is_given_and_no_other(bundle: Bundle) -> None:
    assert bundle.server is not None
    with Server(bundle.server, port=0, client=bundle.client) as server:
        content = fetch(server, "/client/manifest.json")
        manifest = decode_manifest(content, PartyManifest, "manifest.json")
        assert manifest == bundle.client.manifest
        for name, digest in manifest.files.items():
            assert hashlib.sha256(fetch(server, f"/client/{name}")).hexdigest() == digest
        weights, _ = decode_tensors(fetch(server, "/client/weights.safetensors"), max_header=9999)
        np.testing.assert_equal(weights, dict(bundle.client.weights))
        for path in ("", "state.safetensors", "../server/manifest.json", "%2e%2e/x", "sessions"):
            assert status(server, f"/client/{path}") == 404


def test_large_weights_arrive_whole(bundle: Bundle) -> None:
    assert bundle.server is not None
    large = np.arange(8 << 20, dtype=np.float32)
    part = replace_weights(bundle.client, {**bundle.client.weights, "W1": large})
    with Server(bundle.server, port=0, client=part) as server:
        content = fetch(server, "/client/weights.safetensors")
    weights, _ = decode_tensors(content, max_header=9999)
    assert weights["W1"].tobytes() == large.tobytes()


def replace_weights(party: PartyBundle, weights: Mapping[str, np.ndarray]) -> PartyBundle:
    return PartyBundle(manifest=party.manifest, graphs=party.graphs, weights=weights)


def test_without_a_client_there_is_nothing(bundle: Bundle) -> None:
    assert bundle.server is not None
    with Server(bundle.server, port=0) as server:
        assert status(server, "/client/manifest.json") == 426  # it is a websocket's address


def test_where_tokens_are_needed_the_part_needs_one(bundle: Bundle) -> None:
    assert bundle.server is not None
    tokens = Tokens([(Identity(owner="ana"), hashlib.sha256(TOKEN.encode()).digest())])
    with Server(bundle.server, port=0, client=bundle.client, tokens=tokens) as server:
        assert status(server, "/client/manifest.json") == 401
        assert status(server, "/client/nothing") == 401
        assert status(server, "/client/manifest.json", {"Authorization": "Bearer no"}) == 401
        assert status(server, "/client/manifest.json", {"Authorization": f"Bearer {TOKEN}"}) == 200


def test_another_bundles_client_or_the_servers_own_part_is_not_given_away(bundle: Bundle) -> None:
    assert bundle.server is not None
    other = msgspec.structs.replace(bundle.client.manifest, digest="d2" * 32)
    party = PartyBundle(manifest=other, graphs={}, weights={})
    for part in (party, bundle.server):
        with pytest.raises(UsageError, match="another bundle"):
            ClientFiles(part, bundle.server.manifest)
