"""A client that has several tasks of a step open gets each reply once, whatever is cut."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from functools import cache
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from splitonnx.bundles import Bundle
from splitonnx.messages import TaskKey
from splitonnx.micro_batches import MOST_IN_FLIGHT
from splitonnx.names import ACCUMULATE, UPDATE
from splitonnx.optimizers import AdamW
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.policies.joint_training import JointTraining
from splitonnx.runtime.server.policies.per_client import PerClient
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.workers.pools import WorkerPool
from splitonnx.runtime.workers.remote_executors import RemoteExecutor
from tests.support.clinics import make_options
from tests.support.windows import WindowedClient, make_calm_steps, make_message
from tests.support.zoo import ZOO

PARTS, STEPS = 4, 2
BATCHES = [ZOO["batchnorm_trained"].data(9, seed=seed) for seed in range(STEPS)]
SHAPES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "vanilla": ("r1", ()),
    "u-shaped": ("c1", ("r2",)),
}


@cache
def load(shape: str) -> tuple[Bundle, Executor, Executor]:
    at, tail_at = SHAPES[shape]
    bundle = cut(
        ZOO["batchnorm_trained"].build(),
        at=at,
        tail_at=tail_at,
        optimizer=AdamW(lr=1e-2, clip_norm=1.0),
    )
    assert bundle.server is not None
    client, server = (
        Executor(party, Engine(threads=1)) for party in (bundle.client, bundle.server)
    )
    for executor in (client, server):
        for phase in (ACCUMULATE, UPDATE):
            executor.prepare(phase)
    return bundle, client, server


class Scene:
    """A server in memory, its client, and every end of a task that the server committed."""

    def __init__(
        self,
        shape: str,
        in_flight: int,
        *,
        workers: WorkerPool | None = None,
        joins: PolicyOptions | None = None,
    ) -> None:
        _, client, server = load(shape)
        self.registry = Registry(server.fork(), workers=workers, joins=joins)
        self.client = WindowedClient(self.registry, client.fork(), in_flight)

    @property
    def state(self) -> dict[str, np.ndarray]:
        (session,) = self.registry.sessions
        policy = self.registry.policy
        assert isinstance(policy, PerClient | JointTraining)
        server = policy.models[session.id].executor.state()
        return {**self.client.executor.state(), **server}

    @property
    def tasks_done(self) -> int:
        (session,) = self.registry.sessions
        return session.tasks_done


@cache
def make_expected(shape: str) -> tuple[Scene, dict[str, np.ndarray]]:
    scene = Scene(shape, 1)
    make_calm_steps(scene.client, BATCHES, PARTS)
    return scene, scene.state


def check(scene: Scene, shape: str) -> None:
    calm, state = make_expected(shape)
    for name, array in state.items():
        np.testing.assert_array_equal(scene.state[name], array, err_msg=name)
    for result, expected in zip(scene.client.results, calm.client.results, strict=True):
        for name, array in expected.items():
            np.testing.assert_array_equal(result[name], array, err_msg=name)


def list_moves(client: WindowedClient) -> list[str]:
    moves = ["cut"]
    moves += ["begin"] * (4 * client.can_begin)
    moves += ["up"] * (4 * bool(client.up))
    moves += ["down"] * (4 * bool(client.down))
    return moves


def move(client: WindowedClient, name: str, random: Random) -> None:
    match name:
        case "begin":
            client.begin()
        case "up":
            client.handle_up()
        case "down":
            client.handle_down()
        case _:  # what was sent may have arrived
            for _ in range(random.randint(0, len(client.up))):
                client.handle_up()
            client.connect()


@pytest.mark.parametrize("shape", SHAPES)
def test_any_cuts_leave_every_task_performed_once_with_the_same_replies(shape: str) -> None:
    make_expected(shape)

    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(in_flight=st.integers(2, PARTS + 2), random=st.randoms(use_true_random=False))
    def try_one(in_flight: int, random: Random) -> None:
        scene = Scene(shape, in_flight)
        client = scene.client
        for batch in BATCHES:
            client.begin_step(batch, PARTS)
            while not client.is_done:
                move(client, random.choice(list_moves(client)), random)
        while client.up:
            client.handle_up()
        assert client.restarts == 0
        assert scene.tasks_done == STEPS * (PARTS + 1)
        check(scene, shape)

    try_one()


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_that_the_server_gave_up_begins_again(shape: str) -> None:
    make_expected(shape)
    restarts = 0
    for seed in range(20):
        random, scene = Random(seed), Scene(shape, 3)
        client = scene.client
        for batch in BATCHES:
            client.begin_step(batch, PARTS)
            while not client.is_done:
                if random.random() < 0.05:
                    (session,) = scene.registry.sessions
                    session.abandon()
                    client.connect()
                move(client, random.choice(list_moves(client)), random)
        while client.up:
            client.handle_up()
        restarts += client.restarts
        check(scene, shape)
    assert restarts > 0


def train_with_cuts(scene: Scene, random: Random) -> None:
    for batch in BATCHES:
        scene.client.begin_step(batch, PARTS)
        while not scene.client.is_done:
            move(scene.client, random.choice(list_moves(scene.client)), random)
    while scene.client.up:
        scene.client.handle_up()


@pytest.mark.parametrize("policy", ["sequential", "splitfed-v1"])
def test_policies_of_copies_let_their_clients_have_several_open(policy: str) -> None:
    for seed in range(5):
        scene = Scene("u-shaped", 3, joins=PolicyOptions(name=policy))
        assert scene.client.in_flight == 3
        train_with_cuts(scene, Random(seed))
        check(scene, "u-shaped")


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerPool]:
    bundle, _, _ = load("u-shaped")
    assert bundle.server is not None
    pool = WorkerPool(make_options(bundle.server), workers=1)
    yield pool
    pool.close()


def test_stages_in_a_process_of_their_own_make_the_same(workers: WorkerPool) -> None:
    for seed in range(3):
        scene = Scene("u-shaped", 3, workers=workers)
        train_with_cuts(scene, Random(seed))
        check(scene, "u-shaped")
        scene.registry.end(scene.registry.sessions[0])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_worker_that_ends_takes_the_open_step_with_it(workers: WorkerPool, number: int) -> None:
    scene = Scene("u-shaped", 3, workers=workers)
    client = scene.client
    client.begin_step(BATCHES[0], PARTS)
    for _ in range(number):
        client.begin()
        client.handle_up()
    while client.down:
        client.handle_down()
    client.handle_up()
    policy = scene.registry.policy
    assert isinstance(policy, PerClient)
    executor = policy.models[scene.registry.sessions[0].id].executor
    assert isinstance(executor, RemoteExecutor)
    assert executor._worker is not None
    os.kill(executor._worker.pid, signal.SIGKILL)
    executor._worker._process.wait()
    while client.up or client.can_begin:
        if client.can_begin:
            client.begin()
        client.handle_up()
        if client.dispatcher is not None and client.dispatcher.is_closed:
            break
    assert client.dispatcher is not None
    assert client.dispatcher.is_interrupted
    client.connect()
    while not client.is_done:
        if client.can_begin:
            client.begin()
        while client.up or client.down:
            (client.handle_up if client.up else client.handle_down)()
    make_calm_steps(client, BATCHES[1:], PARTS)
    check(scene, "u-shaped")
    scene.registry.end(scene.registry.sessions[0])


def begin_several(shape: str = "u-shaped", in_flight: int = 3, number: int = 2) -> Scene:
    """Have a client begin several micro-batches, whose first messages the server has handled."""
    scene = Scene(shape, in_flight)
    scene.client.begin_step(BATCHES[0], PARTS)
    for _ in range(number):
        scene.client.begin()
        scene.client.handle_up()
    return scene


def name_task(number: int, phase: str = "accumulate", step: int = 0) -> TaskKey:
    return TaskKey("a" * 32, phase, step, number)


def test_no_client_gets_more_than_the_server_has() -> None:
    shape = "u-shaped"
    assert Scene(shape, 1).client.in_flight == 1
    assert Scene(shape, 0).client.in_flight == 1
    assert Scene(shape, 5).client.in_flight == 5
    assert Scene(shape, 2**63 - 1).client.in_flight == MOST_IN_FLIGHT


@pytest.mark.parametrize(
    ("in_flight", "key", "turn", "reason"),
    [
        (2, name_task(2), 0, "begins micro-batch 2 of step 0 before 0 has ended, and may have 2"),
        (3, name_task(3), 0, "is at micro-batch 3 of step 0, the server at 2"),
        (3, name_task(2), 1, "message 1 of micro-batch 2 of step 0, which has not begun"),
        (3, name_task(0, step=1), 0, "is at step 1, the server at 0"),
        (3, name_task(2**63 - 1), 0, "is at micro-batch 9223372036854775807 of step 0"),
        (3, name_task(1, "update"), 1, "continues"),
        (3, name_task(0, "train"), 1, "continues"),
    ],
)
def test_what_is_not_due_is_refused(in_flight: int, key: TaskKey, turn: int, reason: str) -> None:
    scene = begin_several(in_flight=in_flight)
    fault = scene.client.refused(make_message(key, turn), {})
    assert fault.code == "RemoteProtocolError"
    assert reason in fault.reason
    assert not scene.registry.sessions[0].ledger.is_open  # the step was given up


def test_nothing_follows_the_update_in_its_step() -> None:
    scene = begin_several(number=2)
    client = scene.client
    update = make_message(name_task(2, "update"), 0)
    count = {"splitonnx.micro_batches": np.array(2)}
    assert client.dispatcher is not None
    assert list(client.dispatcher.handle(client._encode(update, count))) == []
    fault = client.refused(make_message(name_task(3), 0), {})
    assert "is at micro-batch 3 of step 0, the server at 3" in fault.reason


def test_a_micro_batch_that_is_open_does_not_begin_again_with_other_contents() -> None:
    scene = begin_several()
    other = make_message(name_task(1), 0)
    fault = scene.client.refused(other, {"splitonnx.weight": np.array(1, np.float32)})
    assert fault.code == "StepConflict"


def test_a_client_that_starts_anew_does_not_get_what_was_begun_before() -> None:
    scene = begin_several()
    _, client, _ = load("u-shaped")
    again = WindowedClient.__new__(WindowedClient)
    again.__dict__.update(scene.client.__dict__)
    again.executor = client.fork()
    again.open, again._order, again._begun, again._finished = {}, [], 0, 0
    again.connect()
    assert not scene.registry.sessions[0].ledger.is_open
