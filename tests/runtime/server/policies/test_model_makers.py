"""How the models of a server's sessions begin: from which state, of whom, and in which process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from splitonnx.bundles import PartyBundle
from splitonnx.errors import (
    BundleError,
    BundleMismatch,
    ForeignSession,
    SessionLost,
    UsageError,
)
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.policies.model_makers import ModelMaker
from splitonnx.runtime.storage.archives import Archive
from splitonnx.runtime.storage.checkpoints import Checkpoint, CheckpointStore
from splitonnx.states import State, read_state, write_state
from tests.support import tiny
from tests.support.registries import ANN, BOB, greet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.split_bundle().save(tmp_path / "bundle")
    return tmp_path / "bundle" / "server"


def open_maker(folder: Path, workers: Any = None) -> ModelMaker:
    party = PartyBundle.load(folder)
    archive = Archive(folder, party.manifest, most_bytes=None, keep_seconds=None)
    return ModelMaker(Executor(party, Engine(threads=1)), archive, workers)


def publish(folder: Path, *, session: str, owner: str, step: int, value: float) -> None:
    party = PartyBundle.load(folder)
    tensors = {name: np.full_like(array, value) for name, array in party.state().items()}
    state = State(tensors=tensors, step=step, session=session, owner=owner)
    write_state(folder, state, party.manifest.digest)


def keep(folder: Path, *, session: str, owner: str, step: int, value: float) -> None:
    party = PartyBundle.load(folder)
    tensors = {name: np.full_like(array, value) for name, array in party.state().items()}
    store = CheckpointStore(folder, party.manifest, session)
    store.write(Checkpoint(session=session, step=step, tensors=tensors, owner=owner))


def test_a_session_begins_untrained_though_another_s_outcome_was_published(folder: Path) -> None:
    publish(folder, session=ANN, owner="", step=5, value=2.0)
    model = open_maker(folder).make(greet(BOB), "bob")
    assert (model.name, model.owner, model.version) == (BOB, "bob", 0)
    state = model.executor.state()
    np.testing.assert_array_equal(state["W2"], tiny.WEIGHTS["W2"])
    assert not state["W2.m"].any()


def test_a_session_begins_from_the_outcome_that_its_client_has_too(folder: Path) -> None:
    publish(folder, session=ANN, owner="", step=5, value=2.0)
    model = open_maker(folder).make(greet(BOB, origin=ANN, start=5), "bob")
    assert model.version == 5
    assert (model.executor.state()["W2"] == 2.0).all()


def test_sessions_go_their_own_ways_from_one_start(folder: Path) -> None:
    maker = open_maker(folder)
    first, second = maker.make(greet(ANN), "ann"), maker.make(greet(BOB), "bob")
    ones = {name: np.ones_like(array) for name, array in first.executor.state().items()}
    first.executor.restore(ones, 9)
    np.testing.assert_array_equal(second.executor.state()["W2"], tiny.WEIGHTS["W2"])
    third = maker.make(greet("c" * 32), "cleo")
    np.testing.assert_array_equal(third.executor.state()["W2"], tiny.WEIGHTS["W2"])


def test_an_owner_s_outcome_is_no_other_owner_s_start(folder: Path) -> None:
    publish(folder, session=ANN, owner="ann", step=5, value=2.0)
    maker = open_maker(folder)
    with pytest.raises(ForeignSession):
        maker.make(greet(BOB, origin=ANN, start=5), "bob")
    assert maker.make(greet(BOB, origin=ANN, start=5), "ann").version == 5


def test_a_session_begins_from_its_owner_s_checkpoint(folder: Path) -> None:
    keep(folder, session=ANN, owner="ann", step=3, value=4.0)
    model = open_maker(folder).make(greet(BOB, origin=ANN, start=3), "ann")
    assert model.version == 3
    assert (model.executor.state()["W2"] == 4.0).all()


def test_where_the_two_sides_were_trained_apart_it_says_by_how_many_steps(folder: Path) -> None:
    publish(folder, session=ANN, owner="", step=5, value=2.0)
    with pytest.raises(BundleMismatch) as caught:
        open_maker(folder).make(greet(BOB, origin=ANN, start=3), "")
    assert (caught.value.local, caught.value.remote) == ("5", "3")


def test_where_another_session_trained_the_client_s_side_it_says_which(folder: Path) -> None:
    publish(folder, session=ANN, owner="", step=5, value=2.0)
    with pytest.raises(BundleMismatch) as caught:
        open_maker(folder).make(greet(BOB, origin="d" * 32, start=5), "bob")
    assert (caught.value.local, caught.value.remote) == (ANN, "d" * 32)


def test_a_session_that_is_known_to_be_older_is_not_begun_again(folder: Path) -> None:
    hello = msgspec.structs.replace(greet(ANN), step=4, kept=(4, 2))
    with pytest.raises(SessionLost) as caught:
        open_maker(folder).make(hello, "ann")
    assert caught.value.session == ANN
    assert 4 in caught.value.wanted


def test_a_session_is_taken_up_from_its_newest_checkpoint(folder: Path) -> None:
    keep(folder, session=ANN, owner="ann", step=2, value=2.0)
    keep(folder, session=ANN, owner="ann", step=4, value=4.0)
    model = open_maker(folder).load(greet(ANN), "ann")
    assert model is not None
    assert (model.owner, model.version, model.is_saved) == ("ann", 4, True)
    assert (model.executor.state()["W2"] == 4.0).all()


def test_without_a_checkpoint_or_a_folder_there_is_nothing_to_take_up(folder: Path) -> None:
    assert open_maker(folder).load(greet(ANN), "ann") is None
    server = tiny.split_bundle().server
    assert server is not None
    maker = ModelMaker(Executor(server, Engine(threads=1)), None, None)
    assert maker.load(greet(ANN), "ann") is None
    assert maker.make(greet(ANN), "ann").version == 0


class Workers:
    """A pool of workers that notes what it is asked for."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, str, bool, int]] = []
        self._executor = Executor(tiny.split_bundle().parties["server"], Engine(threads=1))

    def open(self, owner: str, session: str, tensors: object, step: int) -> Executor:
        self.opened.append((owner, session, tensors is None, step))
        return self._executor.fork()


def test_to_a_worker_no_state_is_sent_that_it_has_already(folder: Path) -> None:
    workers = Workers()
    open_maker(folder, workers).make(greet(BOB), "bob")
    assert workers.opened == [("bob", BOB, True, 0)]


def test_a_trained_state_is_sent_to_the_worker_with_its_step(folder: Path) -> None:
    publish(folder, session=ANN, owner="", step=5, value=2.0)
    workers = Workers()
    maker = open_maker(folder, workers)
    maker.make(greet(BOB, origin=ANN, start=5), "bob")
    maker.make(greet("c" * 32), "cleo")  # its party's state is a trained one: the first is sent
    assert workers.opened == [("bob", BOB, False, 5), ("cleo", "c" * 32, False, 0)]


# --- one model for all ------------------------------------------------------------------------


def make_state(value: float) -> dict[str, np.ndarray]:
    return {n: np.full((4, 2), value, np.float32) for n in ("W2", "W2.m")}


def test_a_recorded_state_makes_a_model_of_no_session(folder: Path) -> None:
    publish(folder, session=ANN, owner="", step=5, value=2.0)
    model = open_maker(folder).restore({**make_state(3.0), "W1@own": np.zeros(3)}, 9)
    assert (model.name, model.owner, model.version, model.list_versions()) == ("", "", 9, ())
    assert {n: set(a.ravel()) for n, a in model.executor.state().items()} == {
        "W2": {3.0}, "W2.m": {3.0}
    }  # fmt: skip


def test_to_a_worker_only_the_model_s_state_is_sent(folder: Path) -> None:
    sent = []

    class Worker:
        step = 9

        def restore(self, tensors: dict[str, np.ndarray], step: int) -> None:
            sent.append((sorted(tensors), step))

    class Pool:
        def open(self, *_: object) -> Worker:
            return Worker()

    open_maker(folder, Pool()).restore({**make_state(3.0), "W1@own": np.zeros(3)}, 9)
    assert sent == [(["W2", "W2.m"], 9)]  # else its state would have the old joined tensors


def test_the_record_of_a_policy_with_copies_makes_no_model(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"without 'W2.m', by another policy; .* without --resume"):
        open_maker(folder).restore({"W2": np.zeros((4, 2), np.float32)}, 9)


def test_a_model_s_state_is_published_as_a_session_s_outcome(folder: Path) -> None:
    maker = open_maker(folder)
    maker.publish(make_state(3.0), step=4, session=BOB, owner="bob")
    written = read_state(folder, PartyBundle.load(folder).manifest)
    assert written is not None
    assert (written.session, written.owner, written.step) == (BOB, "bob", 4)
    assert (written.tensors["W2"] == 3.0).all()


def test_without_a_folder_nothing_is_published() -> None:
    maker = ModelMaker(Executor(tiny.split_bundle().parties["server"], Engine(threads=1)), None,
                       None)  # fmt: skip
    with pytest.raises(BundleError, match="no folder"):
        maker.publish(make_state(3.0), step=4, session=BOB, owner="bob")
