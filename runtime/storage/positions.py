"""Positions in the training data, which a client's checkpoints contain."""

from __future__ import annotations

from typing import Annotated

import msgspec

_Count = Annotated[int, msgspec.Meta(ge=0)]


class Best(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The best evaluation of a run so far, at whose state training ends.

    ``epoch`` is the number of its epoch, starting from 0, and ``step`` the step after that epoch.
    ``value`` is the metric, or ``None`` if it was not finite.  ``waited`` counts the evaluations
    since then.
    """

    epoch: _Count
    step: _Count
    value: float | None
    waited: _Count = 0


class DataPosition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The position in the data at which the next step begins; only clients use it.

    ``epoch`` counts from 0, and ``batch`` is the number of batches of this epoch that are already
    done.  The other fields describe how the data are split and shuffled, and must not change when
    training resumes.  ``samples`` is the number of samples, or ``None`` if it is unknown.
    ``accumulate`` is the number of micro-batches of a step.
    ``schedule`` and ``stopping`` describe the learning-rate schedule and when training stops early;
    they are empty without.  ``best`` is the best evaluation before this position.
    ``unshared_steps`` and ``unshared_samples`` count what was trained since the client last shared
    its parameters, and ``round`` is the number of the round whose joined parameters it last
    received; they stay 0 if the server does not join what its clients learn.
    """

    epoch: _Count
    batch: _Count
    batch_size: _Count
    seed: int
    shuffle: bool
    samples: _Count | None
    accumulate: _Count = 1
    schedule: str = ""
    stopping: str = ""
    best: Best | None = None
    unshared_steps: _Count = 0
    unshared_samples: _Count = 0
    round: _Count = 0
