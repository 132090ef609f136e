"""What a server keeps on disk: whose it is, how much, for how long, and only what is of use."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import BundleMismatch, ForeignSession, NotSaved, SplitonnxError, UsageError
from splitonnx.messages import Save, Saved, Unsaved
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.server.servers import Server
from splitonnx.runtime.server.sessions import Session
from splitonnx.runtime.storage.archives import DAY
from splitonnx.runtime.storage.checkpoint_files import list_folders
from splitonnx.runtime.storage.checkpoints import Checkpoint, CheckpointStore
from splitonnx.runtime.storage.round_records import RoundRecord, RoundRecords
from splitonnx.states import State, list_outcomes, read_state, write_state
from tests.support import tiny
from tests.support.registries import ANN, BOB, advance, find_executor, greet, open_registry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.split_bundle().save(tmp_path / "bundle")
    return tmp_path / "bundle" / "server"


def save(session: Session, *, publish: bool = False) -> Saved | Unsaved:
    step = session.ledger.step
    return session.save(Save(session=session.id, step=step, publish=publish))


def finish(registry: Registry, name: str, owner: str, step: int = 1) -> None:
    """Let a session train, publish and end."""
    session = registry.find(greet(name), owner)
    advance(registry, session, step)
    assert isinstance(save(session, publish=True), Saved)
    session.finish()
    registry.end(session)
    registry.release(session)


# --- owners ---------------------------------------------------------------------------------


@pytest.mark.parametrize("later", [False, True], ids=["newest outcome", "older outcome"])
def test_a_finished_session_s_name_stays_its_owner_s(folder: Path, later: bool) -> None:
    registry = open_registry(folder)
    finish(registry, ANN, "ann")
    if later:
        finish(registry, "c" * 32, "cleo")
    before = {path: path.read_bytes() for path in folder.rglob("*.safetensors")}
    for server in (registry, open_registry(folder), open_registry(folder, resume=True)):
        with pytest.raises(ForeignSession):
            server.find(greet(ANN), "bob")
        with pytest.raises(ForeignSession):
            server.find(greet(BOB, origin=ANN, start=1), "bob")
        with pytest.raises(ForeignSession):
            server.find(greet(BOB, origin=ANN, start=1), "")
    assert {path: path.read_bytes() for path in folder.rglob("*.safetensors")} == before
    session = registry.find(greet(BOB, origin=ANN, start=1), "ann")
    np.testing.assert_array_equal(find_executor(registry, session).state()["W2"], np.ones((4, 2)))


@pytest.mark.parametrize("resume", [False, True])
def test_a_session_that_is_only_on_disk_stays_its_owner_s(folder: Path, resume: bool) -> None:
    first = open_registry(folder)
    session = first.find(greet(ANN), "ann")
    advance(first, session, 7)
    assert isinstance(save(session), Saved)
    registry = open_registry(folder, resume=resume)
    with pytest.raises(ForeignSession):
        registry.find(greet(ANN), "bob")
    with pytest.raises(ForeignSession):
        registry.find(greet(BOB, origin=ANN, start=7), "bob")
    assert registry.find(greet(ANN), "ann").owner == "ann"
    assert os.listdir(folder / "sessions" / ANN) == ["7.safetensors"]


def test_what_has_no_owner_is_a_server_s_without_tokens_and_a_published_state_anyone_s(
    folder: Path,
) -> None:
    finish(open_registry(folder), ANN, "")
    finish(open_registry(folder), "c" * 32, "", step=2)
    registry = open_registry(folder)
    with pytest.raises(ForeignSession):
        registry.find(greet(ANN), "bob")
    with pytest.raises(ForeignSession):
        registry.find(greet(BOB, origin=ANN, start=1), "bob")
    session = registry.find(greet(BOB, origin="c" * 32, start=2), "bob")
    assert (session.owner, session.ledger.step) == ("bob", 2)
    assert registry.find(greet(ANN), "").owner == ""


@pytest.mark.parametrize("start", [1, 3])
def test_a_client_at_another_step_than_a_state_that_is_anyone_s_is_told_the_step(
    start: int, folder: Path
) -> None:
    finish(open_registry(folder), ANN, "", step=2)
    registry = open_registry(folder)
    for owner in ("bob", ""):
        with pytest.raises(BundleMismatch) as caught:
            registry.find(greet(BOB, origin=ANN, start=start), owner)
        error = caught.value
        assert (error.subject, error.local, error.remote) == (
            "the number of steps trained", "2", str(start),
        )  # fmt: skip


def test_the_answer_to_a_wrong_start_names_no_session_of_another_owner(folder: Path) -> None:
    finish(open_registry(folder), ANN, "ann")
    registry = open_registry(folder)
    with pytest.raises(BundleMismatch) as caught:
        registry.find(greet(BOB, origin="d" * 32, start=1), "bob")
    assert ANN not in str(caught.value)


def test_nothing_of_another_owner_is_written_over(folder: Path) -> None:
    party = PartyBundle.load(folder)
    store = CheckpointStore(folder, party.manifest, ANN)
    tensors = party.state()
    store.write(Checkpoint(session=ANN, step=1, tensors=tensors, owner="ann"))
    with pytest.raises(SplitonnxError, match="another owner"):
        store.write(Checkpoint(session=ANN, step=2, tensors=tensors, owner="bob"))
    assert store.steps() == (1,)
    state = State(tensors=tensors, step=1, session=ANN, owner="ann")
    write_state(folder, state, party.manifest.digest)
    for newest in (True, False):
        if not newest:
            other = State(tensors=tensors, step=1, session=BOB, owner="bob")
            write_state(folder, other, party.manifest.digest)
        stolen = State(tensors=tensors, step=9, session=ANN, owner="bob")
        with pytest.raises(SplitonnxError, match="another owner"):
            write_state(folder, stolen, party.manifest.digest)
        kept = read_state(folder, party.manifest, ANN)
        assert kept is not None
        assert (kept.step, kept.owner) == (1, "ann")


# --- quota and age --------------------------------------------------------------------------


def measure(folder: Path) -> int:
    files = [*folder.glob("sessions/*/*"), *folder.glob("outcomes/*"), folder / "state.safetensors"]
    return sum(path.stat().st_size for path in files if path.exists())


def test_an_owner_s_saves_end_at_its_quota_and_no_other_s(folder: Path) -> None:
    registry = open_registry(folder, disk_per_owner=4_000, sessions_per_owner=99, sessions=99)
    answers = []
    for number in range(20):
        session = registry.find(greet(f"{number:032x}"), "ann")
        advance(registry, session, 1)
        answers.append(save(session))
    refused = [answer for answer in answers if isinstance(answer, Unsaved)]
    assert 0 < len(refused) < 20
    assert "bytes of the 4000 that they may take (--max-disk-per-owner)" in refused[0].reason
    assert str(folder) not in refused[0].reason
    assert 2_500 < measure(folder) <= 4_000
    other = registry.find(greet(BOB), "bob")
    advance(registry, other, 1)
    assert isinstance(save(other, publish=True), Saved)


def test_a_session_that_goes_on_stays_within_its_quota(folder: Path) -> None:
    registry = open_registry(folder, disk_per_owner=4_000)
    session = registry.find(greet(ANN), "ann")
    for step in range(1, 30):
        advance(registry, session, step)
        assert isinstance(save(session, publish=step % 5 == 0), Saved)
        assert measure(folder) <= 4_000


def test_records_of_rounds_count_for_no_owner_and_do_not_expire(folder: Path) -> None:
    digest = tiny.split_bundle().client.manifest.digest
    large = {"w": np.zeros(100_000, np.float32)}
    RoundRecords(folder, digest).write(RoundRecord(number=3, tensors=large))
    record = folder / "rounds" / "3.safetensors"
    os.utime(record, (0, 0))
    registry = open_registry(folder, disk_per_owner=4_000, keep_seconds=DAY)
    for name, owner in ((ANN, "ann"), (BOB, "")):
        session = registry.find(greet(name), owner)
        advance(registry, session, 1)
        assert isinstance(save(session), Saved)
    assert record.stat().st_size > 4_000 > measure(folder)


def test_a_session_over_its_quota_leaves_the_memory_all_the_same(folder: Path) -> None:
    registry = open_registry(folder, disk_per_owner=100, sessions=1, sessions_per_owner=1)
    session = registry.find(greet(ANN), "ann")
    advance(registry, session, 1)
    registry.release(session)
    assert registry.find(greet(BOB), "bob").owner == "bob"
    assert not list_folders(folder)


def test_what_nobody_came_back_to_is_deleted_after_the_days_said_but_the_newest_outcome(
    folder: Path,
) -> None:
    registry = open_registry(folder)
    finish(registry, ANN, "ann")
    finish(registry, BOB, "bob")
    for name in ("1" * 32, "2" * 32, "3" * 32):
        session = registry.find(greet(name), "ann")
        advance(registry, session, 5)
        save(session)
    for path in folder.rglob("*.safetensors"):
        if "3" * 32 not in str(path):
            os.utime(path, (path.stat().st_mtime - 3 * DAY,) * 2)
    os.utime(folder / "outcomes" / f"{ANN}.safetensors", (0, 0))
    open_registry(folder, keep_seconds=4 * DAY)
    assert {*list_folders(folder)} == {"1" * 32, "2" * 32, "3" * 32}
    assert not list_outcomes(folder)
    for name in ("1" * 32, "2" * 32):
        os.utime(folder / "sessions" / name / "5.safetensors", None)
    later = open_registry(folder, keep_seconds=2 * DAY, resume=True)
    attended = later.find(greet("1" * 32), "ann")
    for name in ("1" * 32, "2" * 32):
        os.utime(folder / "sessions" / name / "5.safetensors", (0, 0))
    later.unload_idle()
    assert {*list_folders(folder)} == {attended.id, "3" * 32}
    newest = read_state(folder, later.manifest)
    assert newest is not None
    assert newest.session == BOB


@pytest.mark.parametrize("days", [0, -1, float("nan"), float("inf")])
def test_a_number_of_days_is_needed(folder: Path, days: float) -> None:
    with pytest.raises(UsageError, match="number of days"):
        Server(folder, port=0, keep_sessions=days)


# --- what is of no use, and what is gone ------------------------------------------------------


def test_a_state_that_is_not_finite_is_neither_saved_nor_published(folder: Path) -> None:
    registry = open_registry(folder)
    session = registry.find(greet(ANN), "")
    advance(registry, session, 3)
    assert isinstance(save(session), Saved)
    advance(registry, session, 4, np.inf)
    for publish in (False, True):
        answer = save(session, publish=publish)
        assert isinstance(answer, Unsaved)
        assert "'W2' holds NaN or infinity" in answer.reason
    assert os.listdir(folder / "sessions" / ANN) == ["3.safetensors"]
    assert not (folder / "state.safetensors").exists()
    registry.release(session)
    registry.unload_all()  # it goes on from its last checkpoint
    assert not registry.sessions
    assert os.listdir(folder / "sessions" / ANN) == ["3.safetensors"]


def test_a_learning_rate_beyond_all_numbers_publishes_nothing_on_either_side(folder: Path) -> None:
    place = folder.parent
    with (
        Server(folder, port=0, threads=1) as server,
        Client(place / "client", server.url, threads=1) as client,
    ):
        client.step(tiny.batch(0), learning_rate=3e38)
        with pytest.raises(NotSaved, match="holds NaN or infinity"):
            client.save()
    for party in ("client", "server"):
        assert not (place / party / "state.safetensors").exists()


def test_a_whole_model_s_infinite_weights_are_not_saved_either(tmp_path: Path) -> None:
    tiny.local_bundle().save(tmp_path / "bundle")
    with Client(tmp_path / "bundle" / "client", threads=1) as client:
        client.step(tiny.batch(0), learning_rate=3e38)
        with pytest.raises(NotSaved, match="holds NaN or infinity"):
            client.save()
    assert PartyBundle.load(tmp_path / "bundle" / "client").trained is None


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


def delete_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def replace_bundle(folder: Path) -> None:
    shutil.rmtree(folder)
    other = Bundle.load(Path(__file__).parents[2] / "vectors" / "dropout").parties["server"]
    other.save(folder)


@pytest.mark.parametrize("publish", [False, True])
@pytest.mark.parametrize("change", [delete, delete_manifest, replace_bundle])
def test_a_folder_that_is_gone_or_another_s_is_not_written_into(
    folder: Path, change: Callable[[Path], None], publish: bool
) -> None:
    registry = open_registry(folder)
    session = registry.find(greet(ANN), "")
    advance(registry, session, 1)
    change(folder)
    before = set(folder.parent.rglob("*"))
    answer = save(session, publish=publish)
    assert isinstance(answer, Unsaved)
    assert "since it was loaded" in answer.reason
    registry.unload_all()
    assert set(folder.parent.rglob("*")) == before


def test_a_client_s_folder_that_is_gone_is_not_made_again(folder: Path) -> None:
    place = folder.parent / "client"
    with (
        Server(folder, port=0, threads=1) as server,
        Client(place, server.url, threads=1) as client,
    ):
        client.fit(tiny.batch(0))
        shutil.rmtree(place)
        with pytest.raises(NotSaved, match="manifest is gone"):
            client.save()
        with pytest.raises(NotSaved, match="manifest is gone"):
            client.fit(tiny.batch(0), checkpoint_every=1)
    assert not place.exists()
