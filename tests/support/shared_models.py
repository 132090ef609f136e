"""One model for several clients by hand: their messages as tasks, and what comes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from splitonnx.bundles import Bundle
from splitonnx.messages import TaskKey
from splitonnx.names import TRAIN
from splitonnx.runtime.server.policies.models import ServerModel
from splitonnx.runtime.server.policies.tasks import Delivery, Task
from tests.support.sharing import greet, source_of


def make_model(bundle: Bundle) -> ServerModel:
    """Return the untrained model of a bundle's server."""
    return source_of(bundle).make(greet(bundle, "f" * 32), "")


def draw(seed: int, rows: int = 2) -> dict[str, np.ndarray]:
    """Return what a client of the tiny model sends in a step."""
    generator = np.random.default_rng(seed)
    return {
        "h": generator.standard_normal((rows, 4)).astype(np.float32),
        "labels": generator.standard_normal((rows, 2)).astype(np.float32),
    }


def step_task(
    session: str,
    tensors: Mapping[str, np.ndarray],
    *,
    step: int = 0,
    turn: int = 0,
    rate: float = 0.1,
    seed: int = 0,
) -> Task:
    """Return a message of a client's training step."""
    key = TaskKey(session, TRAIN, step, 0)
    return Task(key=key, turn=turn, seed=seed, learning_rate=rate, tensors=tensors)


def tell(deliveries: Iterable[Delivery]) -> list[tuple[str, str]]:
    """Return of each delivery the session's first letter and what it is, in order.

    Those that only say that the step waits for its client are left out.
    """
    told = [(delivery.key.session[0], _describe(delivery)) for delivery in deliveries]
    return [(session, what) for session, what in told if what]


def _describe(delivery: Delivery) -> str:
    if delivery.error is not None:
        return type(delivery.error).__name__
    parts = [*sorted(delivery.tensors), *(["done"] if delivery.is_last else [])]
    return " ".join(parts)
