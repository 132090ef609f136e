"""The client need not wait for what only the server uses, such as gradients of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import StageFailed
from splitonnx.messages import TaskKey
from splitonnx.names import Target
from splitonnx.runtime.engine.engines import Engine, LoadedStage, Tensor
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.engine.invariants.sessions import DividedSession
from tests.end_to_end.test_accumulated_steps import cut_zoo
from tests.support.zoo import ZOO

NAME = "wide_convolutions"
TARGETS: Sequence[Target] = ("training", "portable")


class Recording(Engine):
    """An engine that notes what it has computed."""

    def __init__(self) -> None:
        super().__init__(threads=1)
        self.computed: list[str] = []

    def run(self, stage: LoadedStage, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = super().run(stage, feeds)
        self.computed += outputs
        return outputs


class Parties:
    """A client and a server that take steps of two micro-batches, each whole before the next."""

    def __init__(self, bundle: Bundle, engine: Engine, *, renews: bool = True) -> None:
        assert bundle.server is not None
        self.client = Executor(bundle.client, Engine(threads=1))
        self.server = Executor(bundle.server, engine, renews=renews)

    def step(self, number: int) -> None:
        for micro_batch in range(2):
            self.run(TaskKey("s", "accumulate", number, micro_batch))
        self.run(TaskKey("s", "update", number, 2))

    def run(self, key: TaskKey) -> None:
        begin(self.client, key)
        begin(self.server, key)
        waiting = [(self.client, self.server), (self.server, self.client)]
        while not (self.client.is_finished(key) and self.server.is_finished(key)):
            for here, there in waiting:
                for wires in here.advance(key):
                    there.deliver(key, wires)
        self.client.finish(key)
        self.server.finish(key)


def begin(executor: Executor, key: TaskKey) -> None:
    data = ZOO[NAME].data(4, seed=key.step)
    data |= {"splitonnx.weight": np.array(0.5, np.float32), "splitonnx.micro_batches": np.array(2)}
    executor.begin(key, data=data, seed=0, learning_rate=1e-2)


def find_kept(executor: Executor) -> list[DividedSession]:
    return [
        stage.session
        for (phase, _), stage in executor._loaded.items()
        if phase == "accumulate" and isinstance(stage.session, DividedSession)
    ]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("phase", ["train", "accumulate"])
def test_the_reply_comes_before_the_gradients_of_weights(phase: str, target: Target) -> None:
    bundle, engine = cut_zoo(NAME, "vanilla", target), Recording()
    parties, key = Parties(bundle, engine), TaskKey("s", phase, 0, 0)
    begin(parties.client, key)
    begin(parties.server, key)
    for wires in parties.client.advance(key):
        parties.server.deliver(key, wires)
    stage = parties.server.manifest.phase(phase).stages[0]
    replies = parties.server.advance(key)
    sent = next(replies)
    assert sent.keys() == {"sum@server_grad", "loss", "accuracy"}
    late = set(stage.outputs) - set(engine.computed)
    assert late
    assert all(name.endswith("_grad") for name in late)
    for _ in replies:
        pass
    assert set(stage.outputs) <= set(engine.computed)


def test_a_stage_whose_reply_was_taken_goes_on_where_it_was() -> None:
    """Whoever takes replies may stop, and ask again later for what is left."""
    found, expected = (Parties(cut_zoo(NAME, "vanilla"), Engine(threads=1)) for _ in range(2))
    key = TaskKey("s", "accumulate", 0, 0)
    for parties in (found, expected):
        begin(parties.client, key)
        begin(parties.server, key)
        for wires in parties.client.advance(key):
            parties.server.deliver(key, wires)
    replies = found.server.advance(key)
    next(replies)
    del replies
    assert not found.server.is_finished(key)
    assert list(found.server.advance(key)) == []
    list(expected.server.advance(key))
    for parties in (found, expected):
        parties.server.finish(key)
    sums = [dict(parties.server._open._versions) for parties in (found, expected)]
    assert sums[0]
    for name, versions in sums[0].items():
        (one,), (other,) = versions.values(), sums[1][name].values()
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_step_computes_once_is_there_before_it_begins(target: Target) -> None:
    parties = Parties(cut_zoo(NAME, "vanilla", target), Engine(threads=1))
    parties.step(0)
    (session,) = find_kept(parties.server)
    kept = session._kept
    assert kept is not None
    assert kept.is_of([parties.server._state[name]._value for name in session.reads])
    parties.step(1)
    fresh = Parties(cut_zoo(NAME, "vanilla", target), Engine(threads=1), renews=False)
    fresh.step(0)
    assert find_kept(fresh.server)[0]._kept is None
    fresh.step(1)
    for name, array in fresh.server.state().items():
        assert parties.server.state()[name].tobytes() == array.tobytes()


def test_nothing_is_computed_in_advance_where_another_session_s_step_may_be_next() -> None:
    parties = Parties(cut_zoo(NAME, "vanilla"), Engine(threads=1))
    other = Parties(cut_zoo(NAME, "vanilla"), Engine(threads=1))
    other.server = parties.server.fork()
    other.step(0)
    (session,) = find_kept(parties.server)
    assert session._kept is not None
    parties.step(0)
    assert session._kept is None
    del other
    parties.step(1)
    assert session._kept is not None


def test_a_failure_in_advance_leaves_the_step_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    parties = Parties(cut_zoo(NAME, "vanilla"), Engine(threads=1))

    def fail(*_: object) -> None:
        raise StageFailed("body.step", "no memory")

    monkeypatch.setattr(parties.server._engine, "renew", fail)
    parties.step(0)
    assert parties.server.step == 1
    parties.step(1)
    assert parties.server.step == 2
