"""What happened in training: one record a step, one an evaluation, and lines of JSON from them.

Plain values; it runs nothing and prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One optimizer step.

    ``step`` counts the updates of the bundle's whole life from 1, ``epoch`` those of this fit from
    0, ``batch`` the batches of the epoch from 1.  ``loss`` is the batch's mean, before the update;
    ``metrics`` what else the phase reports.  ``seconds`` is the step's wall time; ``bytes_up`` and
    ``bytes_down`` what the client sent and received in it.
    """

    step: int
    epoch: int
    batch: int
    loss: float
    metrics: dict[str, float]
    samples: int
    seconds: float
    bytes_up: int
    bytes_down: int

    @property
    def samples_per_second(self) -> float:
        """Throughput of this step."""
        return self.samples / self.seconds if self.seconds else 0.0


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The metrics on held-out data after an epoch (counted from 0), means over all samples."""

    epoch: int
    metrics: dict[str, float]
    seconds: float


class History(msgspec.Struct, frozen=True, kw_only=True):
    """All that one ``fit`` recorded, in order."""

    steps: list[StepRecord] = []
    evaluations: list[Evaluation] = []

    @property
    def samples_per_second(self) -> float:
        """Mean throughput over all steps, data preparation between steps left out."""
        seconds = sum(record.seconds for record in self.steps)
        return sum(record.samples for record in self.steps) / seconds if seconds else 0.0

    def forget(self, step: int, epoch: int) -> None:
        """Forget the records after ``step`` and the evaluations from ``epoch`` on."""
        self.steps[:] = [record for record in self.steps if record.step <= step]
        self.evaluations[:] = [one for one in self.evaluations if one.epoch < epoch]

    def as_json(self) -> Iterator[str]:
        """Yield one line of JSON a record: every step, then every evaluation."""
        for record in (*self.steps, *self.evaluations):
            yield msgspec.json.encode(record).decode()
