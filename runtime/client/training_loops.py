"""The loop of training: epochs, batches, records, checkpoints, and steps that are made again.

It knows the phases by name and nothing of what the stages compute, nor of how the other party is
reached.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict

import msgspec
import numpy as np

from splitonnx.errors import StepsLost
from splitonnx.manifests import EVALUATE, PREDICT, TRAIN
from splitonnx.runtime.client.datasets import Batch, Dataset
from splitonnx.runtime.client.histories import Evaluation, History, StepRecord
from splitonnx.runtime.client.options import FitPlan, LearningRate
from splitonnx.runtime.client.runners import Half
from splitonnx.runtime.client.runs import Journal
from splitonnx.runtime.engine.executors import LOSS, Executor
from splitonnx.runtime.storage.checkpoints import Position

MOST_RETURNS = 100
"""Times that a server may lose steps before one comes that was not made before."""


class TrainingLoop:
    """Trains and evaluates by one party's half of tasks.

    ``seed`` decides the order of what is evaluated; a fit has its own in its place in the data.
    """

    def __init__(self, executor: Executor, half: Half, journal: Journal, *, seed: int) -> None:
        self._executor = executor
        self._manifest = executor.manifest
        self._half = half
        self._journal = journal
        self._seed = seed

    def fit(self, plan: FitPlan, start: Position) -> History:
        """Train from a place in the data until the plan is carried out, and return what happened.

        Where the server lost steps, both sides go back and make them again.

        Raises:
            StepsLost: they were made before this call.
            SplitonnxError: see :meth:`Client.fit`.
        """
        history = History()
        first, place = self._executor.step, start
        farthest, returns = first, 0
        while True:
            try:
                while place.epoch < plan.epochs:
                    place = self._train_epoch(plan, place, history)
                self._half.place = place
                if plan.save:
                    self._half.publish()
                return history
            except StepsLost as lost:
                reached = history.steps[-1].step if history.steps else first
                returns = 0 if reached > farthest else returns + 1
                farthest = max(farthest, reached)
                if returns == MOST_RETURNS:
                    raise
                kept = self._half.place
                if lost.step < first or (lost.step > first and kept is None):
                    raise
                place = start if kept is None else kept
                history.forget(lost.step, place.epoch)
            except BaseException:  # whoever resumes the run need not wait for close
                self._journal.release()
                raise

    def _train_epoch(self, plan: FitPlan, place: Position, history: History) -> Position:
        """Train from a place to the end of its epoch and evaluate; return the next place."""
        fixed = any(
            isinstance(d, int) for s in self._manifest.phase(TRAIN).data for d in s.shape[:1]
        )
        batches = plan.training.batches(
            place.batch_size,
            seed=place.seed,
            epoch=place.epoch,
            shuffle=place.shuffle,
            drop_last=fixed,
        )
        for batch in itertools.islice(batches, place.batch, None):
            place = msgspec.structs.replace(place, batch=place.batch + 1)
            record = self._record_step(batch, place, plan.learning_rate)
            history.steps.append(record)
            if plan.on_step is not None:
                plan.on_step(record)
            if plan.checkpoint_every is not None and record.step % plan.checkpoint_every == 0:
                self._half.checkpoint(place, plan.when_unsaved)
        if plan.held_out is not None:
            evaluation = self._record_evaluation(plan.held_out, place.batch_size, place.epoch)
            history.evaluations.append(evaluation)
            if plan.on_epoch is not None:
                plan.on_epoch(evaluation)
        return msgspec.structs.replace(place, epoch=place.epoch + 1, batch=0)

    def _record_step(
        self, batch: Batch, place: Position, learning_rate: LearningRate
    ) -> StepRecord:
        up, down = self._half.traffic
        start = time.perf_counter()
        results = self.perform(TRAIN, batch, learning_rate)
        seconds = time.perf_counter() - start
        sent, received = self._half.traffic
        metrics = {name: float(array) for name, array in results.items() if array.ndim == 0}
        return StepRecord(
            step=self._executor.step,
            epoch=place.epoch,
            batch=place.batch,
            loss=metrics.pop(LOSS),
            metrics=metrics,
            samples=self._count(TRAIN, batch),
            seconds=seconds,
            bytes_up=sent - up,
            bytes_down=received - down,
        )

    def _record_evaluation(self, dataset: Dataset, batch_size: int, epoch: int) -> Evaluation:
        start = time.perf_counter()
        metrics = self.evaluate(dataset, batch_size)
        return Evaluation(epoch=epoch, metrics=metrics, seconds=time.perf_counter() - start)

    def evaluate(self, dataset: Dataset, batch_size: int) -> dict[str, float]:
        """Return each metric's mean over all samples of a dataset."""
        totals: dict[str, float] = defaultdict(float)
        samples = 0
        for batch in dataset.batches(batch_size, seed=self._seed, epoch=0, shuffle=False):
            outputs = self.perform(PREDICT, batch)
            size = self._count(PREDICT, batch)
            for name, value in self.perform(EVALUATE, {**batch, **outputs}).items():
                totals[name] += float(value) * size
            samples += size
        return {name: total / samples for name, total in totals.items()}

    def _count(self, phase: str, batch: Batch) -> int:
        return len(batch[self._manifest.phase(phase).data[0].name])

    def perform(
        self, phase: str, data: Batch, learning_rate: LearningRate = None
    ) -> dict[str, np.ndarray]:
        """Carry one task out on a batch and return the phase's results."""
        step = self._executor.step
        rate = learning_rate(step) if callable(learning_rate) else learning_rate
        return self._half.perform(
            phase, data, self._manifest.learning_rate if rate is None else float(rate)
        )
