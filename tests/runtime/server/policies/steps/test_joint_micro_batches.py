"""Joint steps of micro-batches: who takes part, and what ends them."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.errors import StepEnded
from splitonnx.messages import TaskKey
from splitonnx.micro_batches import MICRO_BATCH_WEIGHT
from splitonnx.names import ACCUMULATE
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.server.policies.steps.joint_batches import BatchLayout
from splitonnx.runtime.server.policies.steps.shared_steps import SharedSteps
from splitonnx.runtime.server.policies.tasks import Delivery, Task
from tests.support.shared_models import make_model, step_task, tell
from tests.support.zoo import ZOO

ANN, BOB, EVE = "a" * 32, "b" * 32, "e" * 32
UP = "act1@server"


class Scene:
    """Joint steps on one model, which wait for the sessions ``awaited``."""

    def __init__(self) -> None:
        bundle = cut(ZOO["chain"].build(), at="act1")
        assert bundle.server is not None
        self.model = make_model(bundle)
        self.steps = SharedSteps(layout=BatchLayout(bundle.server.manifest), timeout=10.0)
        self.awaited = {ANN, BOB}

    def submit(self, task: Task) -> list[Delivery]:
        self.steps.add(task, 0.0)
        return list(self.steps.run(self.model, self.awaited, 0.0))


def chain_task(session: str, number: int, weight: float) -> Task:
    tensors = {
        UP: np.full((2, 7), 1.0 + number, np.float32),
        "labels@server": np.array([0, 1]),
        MICRO_BATCH_WEIGHT: np.array(weight, np.float32),
    }
    key = TaskKey(session, ACCUMULATE, 0, number)
    return Task(key=key, turn=0, seed=0, learning_rate=0.1, tensors=tensors)


def test_clients_that_send_whole_batches_are_not_joined_with_those_that_do_not() -> None:
    scene = Scene()
    scene.awaited = {ANN, BOB, EVE}
    whole = {n: a for n, a in chain_task(ANN, 0, 1).tensors.items() if n != MICRO_BATCH_WEIGHT}
    assert tell(scene.submit(step_task(ANN, whole))) == []
    assert tell(scene.submit(chain_task(BOB, 0, 0.5))) == []
    told = dict(tell(scene.submit(chain_task(EVE, 0, 0.5))))
    assert told["a"] == "RemoteProtocolError"
    assert told["b"].endswith("done")
    assert told["e"].endswith("done")
    assert scene.steps.take_left_out() == {ANN}


def test_where_one_client_withdraws_between_two_micro_batches_the_others_begin_again() -> None:
    scene = Scene()
    for session in (ANN, BOB):
        told = scene.submit(chain_task(session, 0, 0.5))
    assert len(told) == 2
    scene.steps.withdraw(scene.model, TaskKey(ANN, ACCUMULATE, 0, 0))
    with pytest.raises(StepEnded):
        scene.submit(chain_task(BOB, 1, 0.5))
    assert scene.model.version == 0


def test_a_client_whose_weights_are_not_its_rows_is_refused_alone() -> None:
    scene = Scene()
    assert tell(scene.submit(chain_task(ANN, 0, 0.3))) == []
    assert sorted(tell(scene.submit(chain_task(BOB, 0, 0.5)))) == [
        ("a", "StepEnded"), ("b", "StepEnded")
    ]  # fmt: skip
    assert tell(scene.submit(chain_task(ANN, 0, 0.3))) == [("a", "RemoteProtocolError")]
    assert tell(scene.submit(chain_task(BOB, 0, 0.5)))[-1][1].endswith("done")
