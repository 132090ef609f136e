"""A client on one machine merges with the server's part on another, which a token lets it fetch."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from splitonnx.errors import StateNotFetched
from splitonnx.partitioner.merges import merge
from splitonnx.runtime.channels.queries import state_downloads
from splitonnx.runtime.channels.queries.server_parts import collect
from splitonnx.runtime.edge.http import HttpResponse
from splitonnx.runtime.server.operations import state_files
from splitonnx.runtime.wire.saved_states import StateQuery
from splitonnx.states import read_state, write_state
from tests.commands.conftest import command  # noqa: F401
from tests.support.certificates import Files
from tests.support.commands import Command, start
from tests.support.parted import Parted, make_parted
from tests.support.waits import SECONDS


@pytest.fixture
def parted(tmp_path: Path) -> Parted:
    return make_parted(tmp_path)


@contextmanager
def serving(parted: Parted, *options: object) -> Iterator[str]:
    """Serve in a process of its own, and yield the address."""
    tokens = ("--token-file", parted.host.parent / "tokens")
    process = start("serve", parted.host, "--threads", 1, "--port", 0, *tokens, *options)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "serving on ws" in line)
        yield "ws" + line.split("serving on ws")[1].split(",")[0].strip()
    finally:
        process.kill()
        process.communicate()


def write_token(parted: Parted, name: str) -> Path:
    path = parted.bundle.with_name(f"token of {name}")
    path.touch(mode=0o600)
    path.write_text(parted.tokens[name])
    return path


def test_a_model_is_merged_from_two_machines_as_on_one(
    parted: Parted, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run: Command = request.getfixturevalue("command")
    merged = tmp_path / "new" / "merged.onnx"
    fetch = ("--token-file", write_token(parted, "fetch"))
    with serving(parted) as url:
        parted.train(url)
        before = set(tmp_path.iterdir())
        others = ("merge", parted.bundle, "-o", merged, "--from", url)
        for name, reason in (
            ("train", "this token may not fetch the server's part"),
            ("operate", "lacks the role 'fetch'"),
            ("whole", "ask whoever runs the server for a token that has it"),
            ("ben", "fetch with a token of the same owner"),
        ):
            assert reason in run.fail(*others, "--token-file", write_token(parted, name))
        assert not merged.parent.exists()
        assert "merged.onnx" in run.succeed("merge", parted.client, *others[2:], *fetch)
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in before} == {
        "new",
        *(f"token of {name}" for name in ("train", "operate", "whole", "ben")),
    }
    assert [path.name for path in merged.parent.iterdir()] == ["merged.onnx"]
    assert merged.read_bytes() == parted.merge_side_by_side(tmp_path / "whole")
    onnx.checker.check_model(onnx.load(merged))


def test_over_tls_the_state_comes_from_the_server_with_the_right_certificate(
    parted: Parted, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run: Command = request.getfixturevalue("command")
    with serving(parted) as url:
        parted.train(url)
    files = Files(tmp_path)
    certificate, key = files.server
    fetch = ("--token-file", write_token(parted, "fetch"))
    with serving(parted, "--tls-cert", certificate, "--tls-key", key) as url:
        words = ("merge", parted.bundle, "-o", tmp_path / "merged.onnx", "--from", url, *fetch)
        assert "cannot be trusted" in run.fail(*words, "--ca", files.other_authority)
        run.succeed(*words, "--ca", files.authority)
    expected = parted.merge_side_by_side(tmp_path / "whole")
    assert (tmp_path / "merged.onnx").read_bytes() == expected


def test_a_state_of_many_pieces_comes_whole(
    parted: Parted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (state_files, state_downloads):
        monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    answered: list[StateQuery] = []
    with parted.serve() as server:
        parted.train(server.url)
        answer = server._responder._states.answer

        def count(query: StateQuery, owner: str) -> HttpResponse:
            answered.append(query)
            return answer(query, owner)

        monkeypatch.setattr(server._responder._states, "answer", count)
        found = collect(parted.bundle, server.url, credentials=parted.credentials())
    assert merge(found) == parted.merge_side_by_side(tmp_path / "whole")
    assert len(answered) > 3


def test_a_state_that_changes_while_it_is_fetched_is_not_mixed(
    parted: Parted, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (state_files, state_downloads):
        monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    with parted.serve() as server:
        parted.train(server.url)
        answer = server._responder._states.answer
        manifest = server._registry.manifest
        before = read_state(parted.host, manifest, is_held=True)
        assert before is not None

        def publish(query: StateQuery, owner: str) -> HttpResponse:
            if query.offset == 1000:
                tensors = {name: array + 1 for name, array in before.tensors.items()}
                write_state(parted.host, replace(before, tensors=tensors), manifest.digest)
            return answer(query, owner)

        monkeypatch.setattr(server._responder._states, "answer", publish)
        with pytest.raises(StateNotFetched, match="published a newer state meanwhile"):
            collect(parted.bundle, server.url, credentials=parted.credentials())


def test_while_a_disk_is_slow_the_server_serves_others(
    parted: Parted, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, goes_on = threading.Event(), threading.Event()
    with parted.serve() as server:
        parted.train(server.url)
        answer = server._responder._states.answer

        def read_slowly(query: StateQuery, owner: str) -> HttpResponse:
            reads.set()
            assert goes_on.wait(SECONDS)
            return answer(query, owner)

        monkeypatch.setattr(server._responder._states, "answer", read_slowly)
        found: list[object] = []
        fetching = threading.Thread(
            target=lambda: found.append(
                collect(parted.bundle, server.url, credentials=parted.credentials())
            )
        )
        fetching.start()
        try:
            assert reads.wait(SECONDS)
            with urllib.request.urlopen(server.url.replace("ws", "http", 1) + "/health") as health:
                assert health.status == 200
            parted.train(server.url, seed=1)
            assert not found
        finally:
            goes_on.set()
            fetching.join(SECONDS)
    assert len(found) == 1
