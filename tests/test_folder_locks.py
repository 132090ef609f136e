"""One server or training client has a party's folder at a time; readers never see a mixture."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from splitonnx import bundles
from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import FolderInUse
from splitonnx.files import map_regular
from splitonnx.folder_locks import NAME, FolderLock
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.server.servers import Server
from splitonnx.states import State, read_state, write_state
from tests.conftest import ROOT
from tests.support import tiny

DATA = tiny.batch(0, 12)
FIRST, SECOND = "a" * 32, "b" * 32

HOLD = """
import sys
from pathlib import Path
from splitonnx.files import map_regular
from splitonnx.folder_locks import FolderLock
lock = FolderLock.acquire(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""

WRITE = """
import sys
from pathlib import Path
from splitonnx.bundles import PartyBundle
from splitonnx.states import State, write_state
folder, session = Path(sys.argv[1]), sys.argv[2]
party = PartyBundle.load(folder)
start = party.weights["W1"]
print("ready", flush=True)
sys.stdin.readline()
for step in range(1, 60):
    tensors = {name: array * 0 + step for name, array in party.state().items()}
    write_state(folder, State(tensors=tensors, step=step, session=session), party.manifest.digest)
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny.split_bundle().save(tmp_path / "bundle")
    return tmp_path / "bundle"


@contextmanager
def running(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", program, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_second_process_is_told_who_has_the_folder(saved: Path) -> None:
    with running(HOLD, str(saved / "server")) as holder:
        told = rf"is in use by process {holder.pid}, .* copy"
        assert (saved / "server" / NAME).read_text() == f"{holder.pid}\n"
        with pytest.raises(FolderInUse, match=told):
            Server(saved / "server", port=0)
    Server(saved / "server", port=0).close()  # the holder was killed


def test_two_servers_of_one_process_exclude_each_other(saved: Path) -> None:
    with Server(saved / "server", port=0, threads=1):
        with pytest.raises(FolderInUse, match="another server or client of this process"):
            Server(saved / "server", port=0)
        with pytest.raises(FolderInUse):
            Server(PartyBundle.load(saved / "server"), port=0)
    with Server(saved / "server", port=0, threads=1):
        pass
    assert not (saved / "server" / NAME).exists()


def test_a_second_client_trains_once_the_first_is_closed(saved: Path) -> None:
    with Server(saved / "server", port=0, threads=1) as server:
        first = Client(saved / "client", server.url, threads=1)
        first.fit(DATA, checkpoint_every=1)
        second = Client(saved / "client", server.url, threads=1)
        assert second.predict({"x": DATA["x"]})["y"].shape == (12, 2)  # which reads alone
        with pytest.raises(FolderInUse):
            second.fit(DATA, checkpoint_every=1, restart=True)
        with pytest.raises(FolderInUse):
            second.save()
        with pytest.raises(FolderInUse):
            Client(saved / "client", server.url, resume=True)
        first.save()
        first.close()
        second.fit(DATA, checkpoint_every=1)
        second.close()
    assert not (saved / "client" / NAME).exists()


def test_training_that_is_broken_off_leaves_the_folder_to_the_next(saved: Path) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with Server(saved / "server", port=0, threads=1) as server:
        first = Client(saved / "client", server.url, threads=1)
        with pytest.raises(KeyboardInterrupt):
            first.fit(DATA, batch_size=4, checkpoint_every=1, on_step=stop)
        with Client(saved / "client", server.url, threads=1, resume=True) as second:
            second.fit(DATA, batch_size=4, checkpoint_every=1, save=True)
    assert PartyBundle.load(saved / "client").step == 3


def test_a_folder_in_which_no_file_can_be_made_is_locked_itself(saved: Path) -> None:
    (saved / "server" / NAME).mkdir()  # as good as a read-only folder, for root too
    lock = FolderLock.acquire(saved / "server")
    with pytest.raises(FolderInUse, match="another process"):
        FolderLock.acquire(saved / "server")
    lock.release()
    FolderLock.acquire(saved / "server").release()


def test_two_processes_that_write_leave_no_torn_and_no_mixed_state(saved: Path) -> None:
    folder = saved / "client"
    manifest = PartyBundle.load(folder).manifest
    reads = 0
    with running(WRITE, str(folder), FIRST) as one, running(WRITE, str(folder), SECOND) as other:
        for process in (one, other):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        while one.poll() is None or other.poll() is None:
            for session in (FIRST, SECOND, ""):
                state = read_state(folder, manifest, session)
                if state is not None:
                    reads += 1
                    values = {float(v) for a in state.tensors.values() for v in np.unique(a)}
                    assert values == {float(state.step)}
        assert (one.returncode, other.returncode) == (0, 0)
    assert reads
    newest = read_state(folder, manifest)
    assert newest is not None
    assert newest.step == 59
    assert not [path for path in folder.rglob(".*") if path.name != NAME]


def test_a_session_s_outcome_is_found_while_another_replaces_it(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, party = saved / "client", Bundle.load(saved).client

    def publish(session: str, step: int) -> None:
        state = State(tensors=party.state(), step=step, session=session)
        write_state(folder, state, party.manifest.digest)

    publish(FIRST, 1)
    publish(SECOND, 2)

    def publish_between(path: Path) -> memoryview:
        """Between the looks at the two places, the session publishes again: its file is gone."""
        if path.parent.name == "outcomes" and path.stem == FIRST:
            monkeypatch.setattr("splitonnx.states.map_regular", map_regular)
            assert path.exists()
            publish(FIRST, 3)
            assert not path.exists()
        return map_regular(path)

    monkeypatch.setattr("splitonnx.states.map_regular", publish_between)
    state = read_state(folder, party.manifest, FIRST)
    assert state is not None
    assert (state.session, state.step) == (FIRST, 3)


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny.split_bundle()
    graphs = {name: graph + b"\x92\x06\x00" for name, graph in other.client.graphs.items()}
    read = bundles._read_graphs

    def replace_meanwhile(folder: Path, manifest: object) -> dict[str, bytes]:
        monkeypatch.setattr(bundles, "_read_graphs", read)
        os.rename(saved, saved.with_name("old"))
        make_other(graphs).save(saved)
        return read(folder, manifest)  # type: ignore[arg-type]

    monkeypatch.setattr(bundles, "_read_graphs", replace_meanwhile)
    assert PartyBundle.load(saved / "client").graphs == graphs


def make_other(graphs: dict[str, bytes]) -> Bundle:
    bundle = tiny.split_bundle()
    files = {name: hashlib.sha256(graph).hexdigest() for name, graph in graphs.items()}
    manifest = msgspec.structs.replace(bundle.client.manifest, files=files)
    client = replace(bundle.client, graphs=graphs, manifest=manifest)
    return replace(bundle, parties={**bundle.parties, "client": client})
