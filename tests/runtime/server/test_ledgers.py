"""Hypothesis against protocol, ledger, sessions and client, in memory: nothing lost, nothing twice.

Messages are lost, delayed to after the next connection's, cut off from their replies; either
process ends at any moment and is started again on its folder.  Whenever anybody looks, a side that
is at step ``n`` must have exactly the state that it has there in a training without faults, where
the state is a hash of all that went into it; and in the end both have made every step once.

    python -m tests.runtime.server.test_ledgers 3000

tries so many random rows of faults of each sort; the tests take a few that are always the same.
"""

from __future__ import annotations

import atexit
import hashlib
import itertools
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import SplitonnxError
from splitonnx.messages import TaskKey, Tensors
from splitonnx.optimizers import AdamW
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.channels.retries import Backoff
from splitonnx.runtime.client import clients
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.server.ledgers import Query
from tests.support.hashing import HashingEngine
from tests.support.networks import HONEST, ClientCrash, Event, Network
from tests.support.registries import find_executor
from tests.support.zoo import ZOO

BATCH, STEPS_AN_EPOCH, EPOCHS, EVERY = 2, 3, 2, 2
DATA = ZOO["dropout"].data(BATCH * STEPS_AN_EPOCH)
MORE_DATA = ZOO["dropout"].data(3 * BATCH * STEPS_AN_EPOCH)
HELD_OUT = ZOO["dropout"].data(BATCH, seed=8)
STEPS = STEPS_AN_EPOCH * EPOCHS
SHAPES: Mapping[str, tuple[str, tuple[str, ...], float | None]] = {
    "vanilla": ("d1", (), None),
    "u-shaped": ("r1", ("flat",), None),
    "u-shaped, clipped": ("r1", ("flat",), 1.0),  # the client has the last word of a step
    "vanilla, accumulated": ("d1", (), None),
    "u-shaped, clipped, accumulated": ("r1", ("flat",), 1.0),
}
"""Where the network is cut, and the norm to which its gradients are clipped."""
MICRO_BATCHES = 3
"""Of the steps of the shapes that say so; each has as many rows as the others' steps."""
FAULTS = [event for event in HONEST if event not in (Event.PASS, Event.LATE)]
LOSSES = [Event.BREAK, Event.LOSE, Event.BREAK_AFTER, Event.DELAY]
ENDS = [event for event in FAULTS if event not in LOSSES]
MEMORY = Path("/dev/shm")
SCRATCH = tempfile.mkdtemp(
    prefix="splitonnx-machine-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None
)
"""In memory where that can be had: what a disk does to checkpoints is tried elsewhere."""
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)


def digest_state(state: Mapping[str, np.ndarray]) -> str:
    seen = hashlib.sha256()
    for name in sorted(state):
        seen.update(name.encode() + np.ascontiguousarray(state[name]).tobytes())
    return seen.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Course:
    """A bundle on disk, what runs it, and what a training without faults comes to.

    ``digests`` are each party's at every step, ``events`` the times that the client dials, sends
    and receives.
    """

    bundle: Path
    engine: Engine
    digests: Mapping[str, Mapping[int, str]]
    published: Sequence[str]
    events: int
    accumulate: int

    def start(self, folder: Path) -> Side:
        """Begin a training of the bundle in a folder."""
        return Side(self.bundle, self.engine, folder, self.accumulate)


class Side:
    """One training's two folders and the network between them."""

    def __init__(self, bundle: Path, engine: Engine, folder: Path, accumulate: int = 1) -> None:
        self.accumulate = accumulate
        # links do for copies, since files are replaced and never changed
        self.folder = Path(shutil.copytree(bundle, folder / "bundle", copy_function=os.link))
        self.network = Network(self.folder, engine)
        self._engine = engine

    def train(self, look: Callable[[Client], None]) -> None:
        """Train as the command does with ``--resume``, till all epochs are made and saved."""
        with (
            patch.object(clients, "Engine", lambda *_, **__: self._engine),
            patch.object(Backoff, "delays", lambda _: itertools.repeat(0.0)),
        ):
            self._train(look)

    def _train(self, look: Callable[[Client], None]) -> None:
        client = Client(self.folder / "client", self.network.dial, resume=True)
        client.fit(
            DATA if self.accumulate == 1 else MORE_DATA,
            epochs=EPOCHS,
            batch_size=BATCH * self.accumulate,
            accumulate=self.accumulate,
            eval_data=HELD_OUT,
            checkpoint_every=EVERY,
            save=True,
            on_step=lambda _: look(client),
        )
        look(client)
        client.close()

    def published(self) -> Sequence[str]:
        """Digest what both folders have as their outcome."""
        parties = (PartyBundle.load(self.folder / name) for name in ("client", "server"))
        return [f"{party.step} {digest_state(party.state())}" for party in parties]


@cache
def make_course(shape: str, *, hashed: bool) -> Course:
    """Cut the network and train it without faults."""
    at, tail_at, clip_norm = SHAPES[shape]
    optimizer = AdamW(lr=1e-3, clip_norm=clip_norm)
    bundle = cut(ZOO["dropout"].build(), at=at, tail_at=tail_at, optimizer=optimizer)
    manifests = [party.manifest for party in bundle.parties.values()]
    engine = HashingEngine(manifests) if hashed else Engine(threads=1)
    folder = Path(tempfile.mkdtemp(dir=SCRATCH))
    bundle.save(folder / "bundle")
    accumulate = MICRO_BATCHES if shape.endswith("accumulated") else 1
    side = Side(folder / "bundle", engine, folder / "calm", accumulate)
    digests = {name: {0: digest_state(party.state())} for name, party in bundle.parties.items()}

    def look(client: Client) -> None:
        digests["client"][client.steps] = digest_state(client.state())
        for session in side.network.registry.sessions:
            executor = find_executor(side.network.registry, session)
            digests["server"][executor.step] = digest_state(executor.state())

    side.train(look)
    return Course(
        bundle=folder / "bundle",
        engine=engine,
        digests=digests,
        published=side.published(),
        events=side.network.events,
        accumulate=accumulate,
    )


def check(course: Course, side: Side, client: Client | None = None) -> None:
    """Hold every state in memory against the one that it has at its step without faults."""
    for session in side.network.registry.sessions:
        executor = find_executor(side.network.registry, session)
        step, state = executor.step, executor.state()
        assert step == session.ledger.step
        assert digest_state(state) == course.digests["server"][step], step
    if client is not None:
        assert digest_state(client.state()) == course.digests["client"][client.steps], client.steps


class Machine(RuleBasedStateMachine):
    """Trainings that end in a crash, one after the other; the last one goes through to the end."""

    hashed = True
    events: Sequence[Event] = HONEST
    tolerated: type[BaseException] = ClientCrash

    def __init__(self) -> None:
        super().__init__()
        self.scratch = Path(tempfile.mkdtemp(dir=SCRATCH))

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        shape = data.draw(st.sampled_from(list(SHAPES)), label="shape")
        self.course = make_course(shape, hashed=self.hashed)
        self.side = self.course.start(self.scratch)

    @rule(data=st.data(), to_the_end=st.booleans())
    def train(self, data: st.DataObject, to_the_end: bool) -> None:
        network = self.side.network
        network.script.extend(data.draw(scripts(self.events, self.course.events), label="script"))
        network.ends_in_crash = not to_the_end
        with suppress(ClientCrash, self.tolerated):
            self.side.train(self.look)
        network.script.clear()

    @rule()
    def crash_the_server(self) -> None:
        self.side.network.crash_server()

    @rule()
    def stop_the_server(self) -> None:
        self.side.network.stop_server()

    @rule()
    def deliver_what_was_delayed(self) -> None:
        self.side.network.deliver_late()

    @invariant()
    def the_server_is_where_it_is_without_faults(self) -> None:
        check(self.course, self.side)

    def look(self, client: Client) -> None:
        check(self.course, self.side, client)

    def teardown(self) -> None:
        if hasattr(self, "side"):
            self.side.network.ends_in_crash = False
            self.side.train(self.look)
            assert self.side.published() == self.course.published
            assert {*self.side.network.count_replies().values()} <= {1}
        shutil.rmtree(self.scratch)


def scripts(events: Sequence[Event], length: int) -> st.SearchStrategy[list[Event]]:
    """Draw what happens: nothing for a while, then one fault after the other."""
    lead = st.integers(0, length)
    pause = st.integers(0, 8)
    faults = st.sampled_from([event for event in events if event is not Event.PASS])
    pieces = st.lists(st.tuples(pause, faults), min_size=1, max_size=12)
    return st.builds(_line_up, lead, pieces)


def _line_up(lead: int, pieces: Sequence[tuple[int, Event]]) -> list[Event]:
    script = [Event.PASS] * lead
    for pause, fault in pieces:
        script += [Event.PASS] * pause + [fault]
    return script


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A training through one fault: the steps that were looked at, and what it came to."""

    place: int
    crashed: bool
    steps: Sequence[int]
    published: Sequence[str]


@cache
def try_fault(shape: str, event: Event) -> Sequence[Trial]:
    """Train with a fault in each place of a training, and check every state on the way."""
    course = make_course(shape, hashed=True)
    return [try_place(course, event, place) for place in range(course.events)]


def try_place(course: Course, event: Event, place: int) -> Trial:
    side = course.start(Path(tempfile.mkdtemp(dir=SCRATCH)))
    side.network.script.extend([*[Event.PASS] * place, event, Event.LATE])
    steps, crashed = list[int](), False

    def look(client: Client) -> None:
        check(course, side, client)
        steps.append(client.steps)

    try:
        side.train(look)
    except ClientCrash:
        crashed = True
        side.train(look)
    published = side.published()
    shutil.rmtree(side.folder.parent)
    return Trial(place=place, crashed=crashed, steps=steps, published=published)


@pytest.mark.parametrize(
    ("shape", "event"),
    [
        *(("u-shaped, clipped", event) for event in FAULTS),
        *(("vanilla", event) for event in LOSSES),
        # that a process ends is held above, and for this shape by random rows of faults
        *(pytest.param("vanilla", event, marks=pytest.mark.sweep) for event in ENDS),
        *(("u-shaped, clipped, accumulated", event) for event in FAULTS),
        *(("vanilla, accumulated", event) for event in LOSSES),
    ],
)
def test_each_fault_in_each_place_of_a_training(shape: str, event: Event) -> None:
    course = make_course(shape, hashed=True)
    trials = try_fault(shape, event)
    assert len(trials) == course.events
    for trial in trials:
        assert trial.published == course.published, trial.place


@pytest.mark.parametrize("event", LOSSES)
@pytest.mark.parametrize("shape", [name for name in SHAPES if name != "u-shaped"])
def test_a_lost_connection_costs_no_step(shape: str, event: Event) -> None:
    for trial in try_fault(shape, event):
        assert not trial.crashed, trial.place
        assert trial.steps == [*range(1, STEPS + 1), STEPS], trial.place


@pytest.mark.parametrize("event", LOSSES)
@pytest.mark.parametrize("shape", ["u-shaped, clipped", "u-shaped, clipped, accumulated"])
def test_replies_that_were_lost_are_not_computed_again(shape: str, event: Event) -> None:
    course = make_course(shape, hashed=True)
    parties = Bundle.load(course.bundle).parties.values()
    engine = HashingEngine([party.manifest for party in parties], drifts=True)
    for place in range(course.events):
        folder = Path(tempfile.mkdtemp(dir=SCRATCH))
        side = Side(course.bundle, engine, folder, course.accumulate)
        side.network.script.extend([*[Event.PASS] * place, event, Event.LATE])
        side.train(lambda _: None)
        assert {*side.network.count_replies().values()} == {1}, place
        shutil.rmtree(side.folder.parent)


class Mischief(Machine):
    """The same with messages lost, doubled or swapped within a connection, which TCP never does.

    That may end the client with an error, as a crash does, and never in another state.
    """

    events = tuple(Event)
    tolerated = SplitonnxError


class Real(Machine):
    """The same with ONNX Runtime."""

    hashed = False


MACHINES = (Machine, Mischief, Real)


def limit(examples: int, *, derandomize: bool) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=8,
        deadline=None,
        derandomize=derandomize,
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize(("machine", "examples"), [(Machine, 50), (Mischief, 40), (Real, 6)])
def test_any_row_of_faults_ends_in_the_state_without_faults(
    machine: type[Machine], examples: int
) -> None:
    run_state_machine_as_test(machine, settings=limit(examples, derandomize=True))


def test_a_query_is_named_by_its_first_message_and_counts_from_nothing() -> None:
    message = Tensors(
        session="a" * 32,
        phase="predict",
        step=3,
        micro_batch=0,
        turn=0,
        seed=1,
        learning_rate=0.1,
    )
    query = Query(message=message)
    assert query.key == TaskKey("a" * 32, "predict", 3, 0)
    assert (query.turns, query.replies) == (0, 0)
    query.turns += 1
    assert query.key == Query(message=message).key


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    for kind in MACHINES:
        print(f"{kind.__name__}: {sys.argv[1]} rows of faults", flush=True)
        run_state_machine_as_test(kind, settings=limit(int(sys.argv[1]), derandomize=False))
