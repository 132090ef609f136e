from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from splitonnx.checksums import encode_with_checksum
from splitonnx.errors import BundleError, NotSaved, UsageError
from splitonnx.manifests import PartyManifest
from splitonnx.runtime.storage.checkpoint_files import list_sessions
from splitonnx.runtime.storage.checkpoints import Checkpoint, CheckpointStore
from splitonnx.runtime.storage.positions import DataPosition
from tests.support import tiny

SESSION = "0123456789abcdef" * 2
OTHER = "f" * 32
POSITION = DataPosition(epoch=1, batch=7, batch_size=6, seed=3, shuffle=True, samples=90)


def client_manifest() -> PartyManifest:
    return tiny.split_bundle().client.manifest


def state(step: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(step)
    return {
        name: generator.standard_normal(array.shape).astype(array.dtype)
        for name, array in tiny.split_bundle().client.state().items()
    }


def checkpoint(step: int, session: str = SESSION) -> Checkpoint:
    return Checkpoint(
        session=session, step=step, tensors=state(step), position=POSITION, owner="ann"
    )


def open_store(folder: Path, session: str = SESSION, kept: int = 2) -> CheckpointStore:
    return CheckpointStore(folder, client_manifest(), session, kept=kept)


def write_steps(folder: Path, *steps: int) -> CheckpointStore:
    store = open_store(folder)
    for step in steps:
        store.write(checkpoint(step))
    return store


def names(folder: Path, session: str = SESSION) -> set[str]:
    return {path.name for path in (folder / "sessions" / session).iterdir()}


def assert_equal(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes()


def place(folder: Path, name: str) -> Path:
    return folder / "sessions" / SESSION / name


def test_a_checkpoint_comes_back_as_it_was_written(tmp_path: Path) -> None:
    open_store(tmp_path).write(checkpoint(12))
    store = open_store(tmp_path)
    assert store.steps() == (12,)
    found = store.read(12)
    assert (found.session, found.step, found.owner) == (SESSION, 12, "ann")
    assert found.position == POSITION
    assert_equal(found.tensors, state(12))


def test_a_server_s_checkpoint_has_no_position(tmp_path: Path) -> None:
    open_store(tmp_path).write(replace(checkpoint(0), position=None))
    found = open_store(tmp_path).read(0)
    assert (found.step, found.position) == (0, None)


def test_any_safetensors_reader_reads_a_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path, 12)
    found = load_file(place(tmp_path, "12.safetensors"))
    for name, array in state(12).items():
        np.testing.assert_array_equal(found[name], array)


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    store = write_steps(tmp_path, 5, 10, 15, 120)
    assert store.steps() == (120, 15)
    assert names(tmp_path) == {"120.safetensors", "15.safetensors"}


def test_the_newest_two_to_return_to_are_kept_however_many_come_after_them(tmp_path: Path) -> None:
    store = write_steps(tmp_path, 5)
    for step in (5, 10, 15):
        store.write(checkpoint(step), keep=True)
    assert names(tmp_path) == {"15.best.safetensors", "10.best.safetensors"}
    for step in (20, 25, 30):
        store.write(checkpoint(step))
    assert open_store(tmp_path).steps() == (30, 25, 15, 10)
    assert_equal(store.read(10).tensors, state(10))
    store.rewind(10)
    assert store.steps() == (10,)
    store.remove()
    assert not (tmp_path / "sessions" / SESSION).exists()


def test_a_checkpoint_to_return_to_is_not_one_of_another_step(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write(checkpoint(5), keep=True)
    place(tmp_path, "5.best.safetensors").rename(place(tmp_path, "6.best.safetensors"))
    assert open_store(tmp_path).steps() == ()


def test_a_step_to_return_to_and_written_again_is_the_one_later_in_the_data(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.write(checkpoint(5), keep=True)
    other = replace(checkpoint(5), position=None)
    store.write(other)
    assert store.read(5).position == POSITION
    place(tmp_path, "5.best.safetensors").write_bytes(b"broken")
    assert open_store(tmp_path).read(5).position is None


def test_as_many_are_kept_as_are_asked_for(tmp_path: Path) -> None:
    store = open_store(tmp_path, kept=1)
    store.write(checkpoint(1))
    store.write(checkpoint(2))
    assert store.steps() == (2,)


def test_a_step_written_again_is_replaced(tmp_path: Path) -> None:
    store = write_steps(tmp_path, 5)
    other = {name: array * 2 for name, array in state(5).items()}
    store.write(replace(checkpoint(5), tensors=other))
    assert_equal(store.read(5).tensors, other)


def test_what_was_read_outlives_its_file(tmp_path: Path) -> None:
    store = write_steps(tmp_path, 1)
    found = store.read(1)
    for step in (2, 3):
        store.write(checkpoint(step))
    assert store.steps() == (3, 2)
    assert_equal(found.tensors, state(1))


def test_a_stopped_state_stands_beside_the_two_and_goes_with_the_next(tmp_path: Path) -> None:
    store = write_steps(tmp_path, 10, 20)
    store.write_stopped(checkpoint(27))
    assert open_store(tmp_path).steps() == (27, 20, 10)
    assert_equal(open_store(tmp_path).read(27).tensors, state(27))
    store.write_stopped(checkpoint(28))
    assert store.steps() == (28, 20, 10)
    store.write(checkpoint(30))
    assert names(tmp_path) == {"30.safetensors", "20.safetensors"}


def test_a_step_both_stopped_at_and_saved_is_read_from_whichever_is_whole(tmp_path: Path) -> None:
    store = write_steps(tmp_path, 10)
    store.write_stopped(checkpoint(10))
    assert store.steps() == (10,)
    place(tmp_path, "10.safetensors").write_bytes(b"broken")
    assert_equal(open_store(tmp_path).read(10).tensors, state(10))


def test_a_session_that_goes_back_forgets_the_course_it_left(tmp_path: Path) -> None:
    store = write_steps(tmp_path, 10, 20)
    store.write_stopped(checkpoint(25))
    store.rewind(10)
    assert store.steps() == (10,)
    write_steps(tmp_path, 20).write(checkpoint(15))
    assert store.steps() == (15, 10)
    write_steps(tmp_path, 20).write_stopped(checkpoint(17))
    assert store.steps() == (17, 15)


def test_a_session_that_ended_leaves_nothing(tmp_path: Path) -> None:
    store = write_steps(tmp_path, 10, 20)
    store.write_stopped(checkpoint(21))
    store.remove()
    assert not store.folder.exists()
    assert store.steps() == ()
    store.remove()
    assert list_sessions(tmp_path) == ()


def test_a_store_makes_nothing_before_it_writes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.steps() == ()
    with pytest.raises(BundleError, match=r"'3\.safetensors' cannot be read"):
        store.read(3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "session",
    ["", "..", "a" * 31, "a" * 33, "A" * 32, "g" * 32, "../" + "a" * 29, "a" * 32 + "\n",
     "\uff10" * 32, "a" * 31 + "\0"],
)  # fmt: skip
def test_a_session_s_name_is_32_hexadecimal_digits(tmp_path: Path, session: str) -> None:
    with pytest.raises(UsageError, match="32 hexadecimal digits"):
        open_store(tmp_path, session)


def test_sessions_are_listed_by_when_they_were_last_written(tmp_path: Path) -> None:
    for order, session in enumerate([OTHER, SESSION, "a" * 32]):
        open_store(tmp_path, session).write(checkpoint(1, session))
        os.utime(tmp_path / "sessions" / session / "1.safetensors", ns=(0, order))
    open_store(tmp_path, OTHER).write_stopped(checkpoint(2, OTHER))
    (tmp_path / "sessions" / ("e" * 32)).mkdir()
    (tmp_path / "sessions" / "notes").mkdir()
    assert list_sessions(tmp_path) == (OTHER, "a" * 32, SESSION)
    assert list_sessions(tmp_path / "absent") == ()


def test_every_altered_bit_is_noticed(tmp_path: Path) -> None:
    write_steps(tmp_path, 10)
    path = place(tmp_path, "10.safetensors")
    content = path.read_bytes()
    for position in range(len(content)):
        altered = bytearray(content)
        altered[position] ^= 1 << position % 8
        path.write_bytes(altered)
        with pytest.raises(BundleError, match=r"10\.safetensors"):
            open_store(tmp_path).read(10)


def test_every_cut_and_any_addition_is_noticed(tmp_path: Path) -> None:
    write_steps(tmp_path, 10)
    path = place(tmp_path, "10.safetensors")
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(BundleError):
            open_store(tmp_path).read(10)
    path.write_bytes(content + b"\0")
    with pytest.raises(BundleError):
        open_store(tmp_path).read(10)


def test_the_one_before_a_broken_one_is_used_and_the_loss_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_steps(tmp_path, 10, 20)
    path = place(tmp_path, "20.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    store = open_store(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert store.steps() == (10,)
        assert store.steps() == (10,)
    (record,) = caplog.records
    assert "20.safetensors" in record.getMessage()


def test_one_that_breaks_after_it_was_found_whole_is_noticed(tmp_path: Path) -> None:
    store = write_steps(tmp_path, 10, 20)
    assert store.steps() == (20, 10)
    path = place(tmp_path, "20.safetensors")
    path.write_bytes(path.read_bytes()[:-4])
    assert store.steps() == (10,)


def test_a_broken_one_is_not_counted_among_the_kept(tmp_path: Path) -> None:
    write_steps(tmp_path, 10, 20)
    place(tmp_path, "20.safetensors").write_bytes(b"")
    store = write_steps(tmp_path, 30)
    assert store.steps() == (30, 10)
    store.write(checkpoint(40))
    assert names(tmp_path) == {"40.safetensors", "30.safetensors"}


def test_a_renamed_checkpoint_is_noticed(tmp_path: Path) -> None:
    write_steps(tmp_path, 10)
    os.rename(place(tmp_path, "10.safetensors"), place(tmp_path, "11.safetensors"))
    store = open_store(tmp_path)
    assert store.steps() == ()
    with pytest.raises(BundleError, match="it is the checkpoint of step 10"):
        store.read(11)


def test_another_session_s_checkpoint_is_noticed(tmp_path: Path) -> None:
    write_steps(tmp_path, 10)
    os.rename(tmp_path / "sessions" / SESSION, tmp_path / "sessions" / OTHER)
    with pytest.raises(BundleError, match=f"session '{SESSION}'"):
        open_store(tmp_path, OTHER).read(10)


@pytest.mark.parametrize("changes", [{"digest": "d2" * 32}, {"party": "server"}])
def test_another_bundle_s_checkpoint_is_noticed(tmp_path: Path, changes: dict[str, str]) -> None:
    write_steps(tmp_path, 10)
    other = msgspec.structs.replace(client_manifest(), **changes)
    with pytest.raises(BundleError, match="another bundle"):
        CheckpointStore(tmp_path, other, SESSION).read(10)


def test_a_state_that_the_manifest_does_not_declare_is_not_written(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    tensors = state(1)
    with pytest.raises(BundleError, match=r"differ in 'W1\.m'"):
        store.write(replace(checkpoint(1), tensors={"W1": tensors["W1"]}))
    with pytest.raises(BundleError, match=r"should be F32\[3, 4\]"):
        store.write(replace(checkpoint(1), tensors={**tensors, "W1": tensors["W1"].T}))
    with pytest.raises(BundleError, match=f"session '{OTHER}'"):
        store.write(checkpoint(1, OTHER))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    write_steps(tmp_path, 10)
    place(tmp_path, ".20.safetensors.4711").write_bytes(b"half")
    place(tmp_path, "notes.txt").write_text("the user's own")
    assert open_store(tmp_path).steps() == (10,)
    write_steps(tmp_path, 20)
    assert names(tmp_path) == {"10.safetensors", "20.safetensors", "notes.txt"}


def test_the_layout_is_as_documented(tmp_path: Path) -> None:
    write_steps(tmp_path, 10)
    content = place(tmp_path, "10.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    facts = json.loads(header["__metadata__"]["splitonnx"])
    assert facts == {
        "format": "splitonnx.checkpoint/1",
        "party": "client",
        "digest": "d1" * 32,
        "session": SESSION,
        "step": 10,
        "owner": "ann",
        "position": msgspec.to_builtins(POSITION),
    }


def test_something_in_the_way_is_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "sessions").write_text("in the way")
    with pytest.raises(NotSaved, match=r"1\.safetensors cannot be written: .*; what was"):
        write_steps(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["sessions"]


def test_a_file_with_a_checksum_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    write_steps(tmp_path, 10)
    path = place(tmp_path, "10.safetensors")
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    facts = json.loads(header["__metadata__"]["splitonnx"])
    for change in (
        {"step": -1},
        {"format": "splitonnx.checkpoint/2"},
        {"position": {**facts["position"], "batch": -1}},
        {"position": 3},
        {"more": 1},
    ):
        text = json.dumps({**facts, **change})
        path.write_bytes(b"".join(encode_with_checksum(state(10), {"splitonnx": text})))
        with pytest.raises(BundleError, match=r"10\.safetensors: it"):
            open_store(tmp_path).read(10)
    path.write_bytes(b"".join(encode_with_checksum(state(10), {})))
    with pytest.raises(BundleError, match="it is not a checkpoint"):
        open_store(tmp_path).read(10)


@given(st.binary(max_size=600))
def test_no_bytes_are_a_checkpoint_by_chance(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(Path(folder))
        store.folder.mkdir(parents=True)
        (store.folder / "10.safetensors").write_bytes(content)
        assert store.steps() == ()
