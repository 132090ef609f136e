"""Parties that do not belong together, and folders that were altered, are refused by name."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from onnx import TensorProto

from splitonnx.bundles import PartyBundle
from splitonnx.errors import (
    BundleError,
    BundleMismatch,
    ConnectionLost,
    IntegerCut,
    NotACut,
    NotFinite,
    PortInUse,
    SplitonnxError,
    UnknownTensor,
    UsageError,
)
from splitonnx.optimizers import AdamW
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.runtime.server.servers import Server
from tests.support.links import make_bundle
from tests.support.zoo import INT64, ZOO

# --- the connection -------------------------------------------------------------------------


def test_a_client_of_another_bundle_is_refused_with_both_digests() -> None:
    one, other = make_bundle(), cut(ZOO["chain"].build(), at="act1", optimizer=AdamW(lr=0.5))
    assert other.server is not None
    server = Executor(other.server, Engine(threads=1))
    with pytest.raises((BundleMismatch, SplitonnxError)) as caught:
        Client(one.client, connect_in_memory(server))
    sentence = str(caught.value)
    assert one.client.manifest.digest in sentence
    assert other.client.manifest.digest in sentence


def test_wires_that_differ_are_named_with_both_shapes() -> None:
    one, other = make_bundle(at="act1"), make_bundle(at="act2")
    assert other.server is not None
    server = Executor(other.server, Engine(threads=1))
    with pytest.raises(SplitonnxError, match="act1@server") as caught:
        Client(one.client, connect_in_memory(server))
    assert "F32[N, 7]" in str(caught.value)


def test_parties_at_different_steps_are_refused(tmp_path: Path) -> None:
    bundle = make_bundle()
    assert bundle.server is not None
    ahead = replace(bundle.client, trained=bundle.client.state(), step=3)
    with pytest.raises(SplitonnxError, match="number of steps"):
        Client(ahead, connect_in_memory(Executor(bundle.server, Engine(threads=1))))


def test_a_port_in_use_is_named() -> None:
    bundle = make_bundle()
    assert bundle.server is not None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortInUse, match=str(port)), Server(bundle.server, port=port):
            pass


def test_a_server_that_is_not_there_is_a_lost_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(ConnectionLost, match=str(port)):
        Client(make_bundle().client, f"ws://127.0.0.1:{port}")


def test_a_connection_lost_while_training_is_said_and_the_state_kept() -> None:
    bundle = make_bundle()
    assert bundle.server is not None
    with Server(bundle.server, port=0) as server:
        client = Client(bundle.client, server.url, give_up_after=0.1)
        client.step(ZOO["chain"].data(8))
        before = {name: array.copy() for name, array in client.state().items()}
    with pytest.raises(ConnectionLost):
        client.step(ZOO["chain"].data(8))
    for name, array in client.state().items():
        np.testing.assert_array_equal(array, before[name])


def test_the_clients_folder_cannot_be_served_nor_the_servers_trained() -> None:
    bundle = make_bundle()
    with pytest.raises(UsageError, match="client's part"):
        Server(bundle.client)
    with pytest.raises(UsageError, match="name the server"):
        Client(bundle.client)


# --- files ----------------------------------------------------------------------------------


def list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_bundle_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from splitonnx import atomic, bundles

    bundle = make_bundle()
    whole_write: Callable[..., None] = atomic.write_file
    written: list[Path] = []

    def fail_late(path: Path, chunks: object) -> None:
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(path)
        whole_write(path, chunks)

    monkeypatch.setattr(bundles, "write_file", fail_late)
    with pytest.raises(BundleError, match="No space left"):
        bundle.save(tmp_path / "bundle")
    assert len(written) == 5
    assert list_files(tmp_path) == []


def test_a_bundle_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    bundle = make_bundle()
    bundle.save(tmp_path / "bundle")
    with pytest.raises(BundleError, match="exists already"):
        bundle.save(tmp_path / "bundle")
    bundle.save(tmp_path / "bundle", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(BundleError, match="not a bundle"):
        bundle.save(tmp_path / "mine", overwrite=True)


def test_an_altered_bundle_is_noticed(tmp_path: Path) -> None:
    make_bundle().save(tmp_path / "bundle")
    graph = tmp_path / "bundle" / "client" / "head.forward.onnx"
    graph.write_bytes(graph.read_bytes() + b" ")
    with pytest.raises(BundleError, match="altered"):
        PartyBundle.load(tmp_path / "bundle" / "client")


def test_the_same_cut_gives_the_same_bytes(tmp_path: Path) -> None:
    for place in ("one", "two"):
        make_bundle("dropout", "d1").save(tmp_path / place)
    assert list_files(tmp_path / "one") == list_files(tmp_path / "two")
    for path in (tmp_path / "one").rglob("*.*"):
        other = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == other.read_bytes(), path.name


def test_every_error_is_one_line() -> None:
    assert INT64 == TensorProto.INT64
    samples: list[SplitonnxError] = [
        UnknownTensor("a", ["b"]),
        NotACut(["a"], missing=["b"]),
        IntegerCut("a", "INT64", ["w"]),
        BundleMismatch("the digest", "1", "2"),
        NotFinite("x", "row 3"),
        ConnectionLost("ws://x", "it closed"),
    ]
    for error in samples:
        assert "\n" not in str(error)
        assert len(str(error)) > 20


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    make_bundle().save(tmp_path / "bundle")
    path = tmp_path / "bundle" / "client" / "manifest.json"
    fields = msgspec.json.decode(path.read_bytes())
    fields["format"] = "splitonnx.bundle/99"
    path.write_bytes(msgspec.json.encode(fields))
    with pytest.raises(SplitonnxError, match=r"splitonnx\.bundle/99"):
        PartyBundle.load(tmp_path / "bundle" / "client")
