"""What depends on weights alone is computed once for them, and never used for others."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from splitonnx.errors import StageFailed
from splitonnx.runtime.engine.engines import Engine, LoadedStage, Tensor
from splitonnx.runtime.engine.invariants.sessions import DividedSession
from tests.runtime.engine.invariants.test_divisions import (
    CONVOLVED,
    MIRRORED,
    TURNED,
    draw,
    write_graph,
)


class Counter:
    """A session that counts its runs."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.runs = 0

    def run_with_ort_values(self, *arguments: Any) -> Any:
        self.runs += 1
        return self.session.run_with_ort_values(*arguments)


def load() -> tuple[Engine, LoadedStage, Counter]:
    engine = Engine(threads=1)
    content = write_graph(TURNED, MIRRORED, CONVOLVED)
    stage = engine.load("body", content, training=True, steady=("w",))
    assert isinstance(stage.session, DividedSession)
    counter = stage.session._invariant = Counter(stage.session._invariant)
    return engine, stage, counter


def run_whole(feeds: Mapping[str, Tensor]) -> bytes:
    """Return the bytes of what the undivided stage computes."""
    engine = Engine(threads=1)
    stage = engine.load("body", write_graph(TURNED, MIRRORED, CONVOLVED), training=True)
    assert not isinstance(stage.session, DividedSession)
    return engine.to_array(engine.run(stage, feeds)["y"]).tobytes()


def test_the_same_weights_are_moved_once_and_new_ones_again() -> None:
    engine, stage, counter = load()
    feeds = {name: engine.from_array(array) for name, array in draw().items()}
    for number in range(3):
        feeds["x"] = engine.from_array(np.full((1, 16, 5, 5), number + 1, np.float32))
        found = engine.to_array(engine.run(stage, feeds)["y"])
        assert found.tobytes() == run_whole(feeds)
    assert counter.runs == 1
    feeds["w"] = engine.from_array(engine.to_array(feeds["w"]) * np.float32(2))
    assert engine.to_array(engine.run(stage, feeds)["y"]).tobytes() == run_whole(feeds)
    assert counter.runs == 2


def test_two_sets_of_weights_in_turns_do_not_mix() -> None:
    engine, stage, _ = load()
    base = {name: engine.from_array(array) for name, array in draw().items()}
    other = base | {"w": engine.from_array(-engine.to_array(base["w"]))}
    for feeds in (base, other, base):
        assert engine.to_array(engine.run(stage, feeds)["y"]).tobytes() == run_whole(feeds)


def test_what_is_kept_is_freed_with_the_weights() -> None:
    engine, stage, _ = load()
    feeds = {name: engine.from_array(array) for name, array in draw().items()}
    engine.run(stage, feeds)
    kept = weakref.ref(stage.session._kept.values["mirrored"])
    assert kept() is not None
    del feeds["w"]
    gc.collect()
    assert kept() is None


def test_an_input_that_is_missing_fails_the_stage() -> None:
    engine, stage, _ = load()
    feeds = {name: engine.from_array(array) for name, array in draw().items()}
    del feeds["w"]
    with pytest.raises(StageFailed, match="'w' is missing"):
        engine.run(stage, feeds)
