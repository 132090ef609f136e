"""Only regular files of bounded size are opened, whatever a user or a bundle names."""

from __future__ import annotations

import io
import os
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import SplitonnxError
from splitonnx.files import open_regular, read_regular
from splitonnx.manifests import PartyManifest
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.runtime.client import array_files
from splitonnx.runtime.client.datasets import open_dataset
from splitonnx.runtime.edge.tokens import Tokens, add_token, read_token
from splitonnx.runtime.storage.checkpoints import CheckpointStore
from splitonnx.runtime.wire.tls import make_client_tls, make_server_tls
from splitonnx.states import read_state
from tests.support import tiny

SESSION = "0123456789abcdef" * 2
HANGS = 20
"""Seconds after which a call is taken to wait without end."""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="there are no pipes with names")


@pytest.fixture(autouse=True)
def _ended_where_it_hangs() -> Iterator[None]:
    def end(*_: object) -> None:
        raise TimeoutError("it waits for a pipe without a writer")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(HANGS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def manifest() -> PartyManifest:
    return tiny.split_bundle().client.manifest


def read_checkpoint(path: Path) -> object:
    return CheckpointStore(path.parents[2], manifest(), SESSION).read(7)


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a party's manifest": ("client/manifest.json", lambda path: PartyBundle.load(path.parent)),
    "a graph": ("client/evaluate.onnx", lambda path: PartyBundle.load(path.parent)),
    "weights": ("client/weights.safetensors", lambda path: PartyBundle.load(path.parent)),
    "a state": ("client/state.safetensors", lambda path: PartyBundle.load(path.parent)),
    "an outcome": (
        f"client/outcomes/{SESSION}.safetensors",
        lambda path: read_state(path.parents[1], manifest(), SESSION),
    ),
    "a checkpoint": (f"client/sessions/{SESSION}/7.safetensors", read_checkpoint),
    "a bundle's manifest": ("manifest.json", lambda path: Bundle.load(path.parent)),
    "a skeleton": ("model.onnx", lambda path: Bundle.load(path.parent)),
    "a model": ("large.onnx", open_model),
    "data": ("train.npz", open_dataset),
    "data of a folder": ("data/x.npy", lambda path: open_dataset(path.parent)),
    "a server's tokens": ("tokens", Tokens.read),
    "a client's token": ("token", read_token),
    "a new token": ("tokens", lambda path: add_token(path, "ann")),
    "an authority": ("ca.pem", lambda path: make_client_tls(authority=path)),
    "a certificate": ("cert.pem", lambda path: make_server_tls(path, path)),
}


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("reader", READERS)
def test_a_pipe_or_a_device_is_refused_in_one_line_and_not_waited_for(
    tmp_path: Path, reader: str, kind: str
) -> None:
    tiny.split_bundle().save(tmp_path / "bundle")
    name, read = READERS[reader]
    path = tmp_path / "bundle" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    with pytest.raises(SplitonnxError) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert f"it is a {kind}, not a regular file" in str(caught.value) or (
        reader == "a model" and "it is not a file" in str(caught.value)
    )


def test_a_link_to_a_regular_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    assert read_regular(tmp_path / "link", 7) == b"content"


def test_no_more_is_read_than_is_allowed_also_of_a_file_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with pytest.raises(OSError, match="more than 6 bytes"):
        read_regular(path, 6)
    opened: list[int] = []

    def grow(path: Path, most: int) -> int:
        opened.append(open_regular(path, most))
        with Path(path).open("ab") as file:
            file.write(b", and more")
        return opened[-1]

    monkeypatch.setattr("splitonnx.files.open_regular", grow)
    with pytest.raises(OSError, match="more than 7 bytes"):
        read_regular(path, 7)


def test_a_manifest_larger_than_any_is_refused(tmp_path: Path) -> None:
    tiny.split_bundle().save(tmp_path / "bundle")
    os.truncate(tmp_path / "bundle" / "client" / "manifest.json", 1 << 40)  # sparse
    with pytest.raises(SplitonnxError, match=r"'manifest\.json' cannot be read: it has more than"):
        PartyBundle.load(tmp_path / "bundle" / "client")


def test_an_archive_whose_arrays_do_not_fit_into_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "train.npz"
    inner = io.BytesIO()
    np.save(inner, np.zeros((1 << 20, 8)))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", inner.getvalue())
    assert path.stat().st_size < 1 << 18
    monkeypatch.setattr(array_files, "measure_memory", lambda: 64 << 20)
    with pytest.raises(SplitonnxError, match="more than this machine's memory"):
        open_dataset(path)
    monkeypatch.setattr(array_files, "measure_memory", lambda: 65 << 20)
    assert open_dataset(path).size == 1 << 20
