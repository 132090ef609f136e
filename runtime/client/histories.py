"""The history of a training run: one record per step, and one record per evaluation.

This module only defines the records; it does not write or print them.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from splitonnx.runtime.storage.positions import Best


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The record of one training step.

    ``step`` counts the steps since the bundle was created, starting from 1.  ``epoch`` counts the
    epochs of the training run, starting from 0, and ``batch`` counts the batches of the epoch,
    starting from 1.  ``loss`` is the batch's mean loss before the update, and ``metrics`` contains
    the other results of the step.  ``learning_rate`` is the rate of the update.  ``seconds`` is the
    wall time of the step.  ``bytes_up`` and ``bytes_down`` are the numbers of bytes that the client
    sent and received during the step.
    """

    step: int
    epoch: int
    batch: int
    loss: float
    metrics: dict[str, float]
    learning_rate: float
    samples: int
    seconds: float
    bytes_up: int
    bytes_down: int

    @property
    def samples_per_second(self) -> float:
        """Return the number of samples that this step processed per second, or 0 if unknown."""
        return self.samples / self.seconds if self.seconds else 0.0


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an evaluation after an epoch: its numbers over all samples.

    ``metrics`` holds the loss, too.  A metric that the data do not define is NaN.
    ``epoch`` is the number of the epoch, starting from 0.  ``seconds`` is how long the evaluation
    took.
    """

    epoch: int
    metrics: dict[str, float]
    seconds: float


class History(msgspec.Struct, kw_only=True):
    """The records of one call to :meth:`Client.fit`, in chronological order.

    ``best`` is the evaluation whose state the client has at the end, if the best one was kept.  The
    steps after it are in ``steps``, too.
    """

    steps: list[StepRecord] = []
    evaluations: list[Evaluation] = []
    best: Best | None = None

    @property
    def samples_per_second(self) -> float:
        """Return the mean number of samples per second within steps; 0 if there are none."""
        seconds = sum(record.seconds for record in self.steps)
        return sum(record.samples for record in self.steps) / seconds if seconds else 0.0

    def forget(self, step: int, epoch: int) -> None:
        """Remove the records after ``step``, and the evaluations from ``epoch`` onwards."""
        self.steps[:] = [record for record in self.steps if record.step <= step]
        self.evaluations[:] = [one for one in self.evaluations if one.epoch < epoch]

    def as_json(self) -> Iterator[str]:
        """Yield one line of JSON per record: first the steps, then the evaluations."""
        for record in (*self.steps, *self.evaluations):
            yield msgspec.json.encode(record).decode()
