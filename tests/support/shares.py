"""Shares of made-up clients, for tests of rounds and relays."""

from __future__ import annotations

import numpy as np

from splitonnx.messages import TaskKey
from splitonnx.names import SHARE
from splitonnx.runtime.server.policies.joining.rounds import Answer, Share


def make_share(
    session: str, step: int, samples: int = 0, *, value: float = 0.0, leaves: bool = False
) -> Share:
    """Return the share of one tensor, ``w``, which is a single number."""
    return Share(
        key=TaskKey(session, SHARE, step, 0),
        samples=samples,
        leaves=leaves,
        tensors={"w": np.array(value)},
    )


def summarize(answers: list[Answer]) -> dict[str, tuple[int, float]]:
    """Return for each session that is answered the round's number, and the joined tensor."""
    return {a.key.session: (a.joint.number, float(a.joint.tensors["w"])) for a in answers}
