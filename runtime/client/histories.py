"""The history of a training run: one record per step, and one record per evaluation.

This module only defines values; it writes and prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The record of one training step.

    ``step`` counts the steps since the bundle was created, from 1; ``epoch`` counts the epochs of
    this call of ``fit``, from 0; ``batch`` counts the batches of the epoch, from 1.  ``loss`` is
    the mean over the batch before the update, and ``metrics`` holds the step's other results.
    ``seconds`` is the wall time of the step; ``bytes_up`` and ``bytes_down`` are the bytes that the
    client sent and received during the step.
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
        """Return the number of samples that this step processed per second."""
        return self.samples / self.seconds if self.seconds else 0.0


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an evaluation after an epoch: the mean of each metric over all samples.

    ``epoch`` counts from 0.
    """

    epoch: int
    metrics: dict[str, float]
    seconds: float


class History(msgspec.Struct, frozen=True, kw_only=True):
    """The records of one call of :meth:`Client.fit`, in order."""

    steps: list[StepRecord] = []
    evaluations: list[Evaluation] = []

    @property
    def samples_per_second(self) -> float:
        """Return the mean number of samples per second, excluding the time between steps."""
        seconds = sum(record.seconds for record in self.steps)
        return sum(record.samples for record in self.steps) / seconds if seconds else 0.0

    def forget(self, step: int, epoch: int) -> None:
        """Remove the records after ``step`` and the evaluations from ``epoch`` on."""
        self.steps[:] = [record for record in self.steps if record.step <= step]
        self.evaluations[:] = [one for one in self.evaluations if one.epoch < epoch]

    def as_json(self) -> Iterator[str]:
        """Yield one line of JSON per record: every step, then every evaluation."""
        for record in (*self.steps, *self.evaluations):
            yield msgspec.json.encode(record).decode()
