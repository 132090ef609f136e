"""What a round of one model can be restored to, and what a client that leaves ends with."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.errors import BundleError, NotSaved, StateNotFinite
from splitonnx.names import SERVER
from splitonnx.runtime.server.policies.joining.kept_rounds import KeptRounds
from splitonnx.runtime.server.policies.joining.rounds import Adoptions
from splitonnx.runtime.storage.round_records import RoundRecord
from tests.support import tiny
from tests.support.registries import ANN, BOB

SPECS = tiny.split_bundle().parties[SERVER].manifest.state
STATE = tiny.split_bundle().parties[SERVER].state()


def record(number: int, value: float = 1.0) -> RoundRecord:
    """Return a round in which Ann received tensors at step ``number``."""
    tensors = {name: np.full_like(array, value) for name, array in STATE.items()}
    return RoundRecord(number=number, tensors=tensors, adoptions={ANN: ((number, number),)})


class Scene:
    """Rounds that are written into a list, unless ``error`` is set."""

    def __init__(self) -> None:
        self.written: list[RoundRecord] = []
        self.error: Exception | None = None
        self.kept = KeptRounds(None, specs=SPECS, write=self.write)

    def write(self, joint: RoundRecord) -> None:
        if self.error is not None:
            raise self.error
        self.written.append(joint)


def test_only_the_end_of_a_round_is_kept() -> None:
    scene = Scene()
    scene.kept.write(record(1))
    adoptions: Adoptions = {ANN: ((1, 1),)}
    scene.kept.keep(ANN, 1, adoptions=adoptions, owners={})
    assert len(scene.written) == 1  # it was on disk already
    for session, step in ((ANN, 2), (BOB, 1)):
        with pytest.raises(NotSaved, match="only the end of a round"):
            scene.kept.keep(session, step, adoptions=adoptions, owners={})


def test_a_step_at_which_a_client_received_a_round_later_is_written_with_it() -> None:
    scene = Scene()
    scene.kept.write(record(1))
    adoptions: Adoptions = {ANN: ((1, 1),), BOB: ((0, 1),)}
    scene.kept.keep(BOB, 0, adoptions=adoptions, owners={BOB: "bob", "gone": "eve"})
    assert scene.written[-1].adoptions == adoptions
    assert scene.written[-1].owners == {BOB: "bob"}
    scene.kept.keep(BOB, 0, adoptions=adoptions, owners={})
    assert len(scene.written) == 2


def test_a_round_that_could_not_be_written_is_written_when_a_client_saves_its_end() -> None:
    scene = Scene()
    scene.error = BundleError("rounds", "the disk is full")
    with pytest.raises(BundleError):
        scene.kept.write(record(1))
    scene.error = None
    scene.kept.keep(ANN, 1, adoptions={ANN: ((1, 1),)}, owners={})
    assert [joint.number for joint in scene.written] == [1]


def test_a_model_with_nan_is_not_written() -> None:
    scene = Scene()
    with pytest.raises(StateNotFinite):
        scene.kept.write(record(1, np.nan))
    assert scene.written == []


def test_a_client_that_leaves_ends_with_what_it_is_answered_with_and_no_later_round() -> None:
    scene = Scene()
    scene.kept.note_leaving(ANN, leaves=True)
    scene.kept.write(record(1, 1.0))
    for session in (ANN, BOB):
        scene.kept.note_answer(session)
    scene.kept.write(record(2, 2.0))
    end = scene.kept.find_end(ANN)
    assert end is not None
    assert end.keys() == STATE.keys()
    assert all((array == np.ones_like(array)).all() for array in end.values())
    assert scene.kept.find_end(BOB) is None  # it trains on
    scene.kept.note_leaving(ANN, leaves=False)
    assert scene.kept.find_end(ANN) is None
