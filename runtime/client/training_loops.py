"""The training loop, which runs epochs, records the results, and repeats lost steps.

The task runner performs the tasks and communicates with the server.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from splitonnx.errors import StepsLost, UnusableData, UsageError
from splitonnx.manifests import PartyManifest
from splitonnx.names import LOSS, ONE_MODEL, PREDICT, TRAIN
from splitonnx.runtime.client.datasets import Batch, Dataset
from splitonnx.runtime.client.histories import Evaluation, History, StepRecord
from splitonnx.runtime.client.metrics.choices import Metric
from splitonnx.runtime.client.metrics.evaluations import (
    EvaluationResults,
    EvaluationTask,
    advance,
    count_samples,
    evaluate,
)
from splitonnx.runtime.client.options import FitOptions, LearningRate, count_rows, has_fixed_rows
from splitonnx.runtime.client.runners import TaskRunner
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.storage.positions import Best, DataPosition

_logger = logging.getLogger("splitonnx.client")

MOST_RETURNS = 100
"""How many times in a row the server may lose steps without any new step in between."""


class TrainingLoop:
    """The loop that trains and evaluates a client's part of a model by running tasks.

    ``seed`` is used only for evaluation.  The seed for training is stored with the position in the
    training data.
    """

    def __init__(self, executor: Executor, runner: TaskRunner, *, seed: int) -> None:
        self._executor = executor
        self._manifest = executor.manifest
        self._runner = runner
        self._seed = seed
        self._told: dict[str, str] = {}  # why a metric was not defined, told once
        self._has_left = False  # nothing more is shared in this run

    def fit(self, options: FitOptions, start: DataPosition) -> History:
        """Train from a position in the data to the end of the last epoch, and return the history.

        If the server lost steps, both sides go back and repeat the lost steps, also those that were
        made before the training was resumed here.

        Raises:
            StepsLost: the lost steps belong to an earlier training, or steps are lost repeatedly.
            SplitonnxError: see :meth:`Client.fit`.
        """
        policy = self._runner.terms.policy
        if options.stopping is not None and policy in ONE_MODEL:
            raise UsageError(
                "early stopping goes back to the best state on both sides, and with the server's "
                f"policy '{policy}' its model is also that of other clients; leave --early-stop "
                "and --keep-best out, or train with another policy"
            )
        history = History()
        first, position = self._executor.step, start
        farthest, returns = first, 0
        self._has_left = False
        while True:
            try:
                position = self._join_others(options, position)
                while not self._is_over(options, position):
                    position = self._train_epoch(options, position, history)
                position = self._leave(options, position)
                position = self._return_to_best(options, position, history)
                self._runner.position = position
                if options.save:
                    self._runner.publish()
                return history
            except StepsLost as lost:
                reached = history.steps[-1].step if history.steps else first
                returns = 0 if reached > farthest else returns + 1
                farthest = max(farthest, reached)
                if returns == MOST_RETURNS:
                    raise
                kept = self._runner.position
                if kept is not None and _is_before(kept, start):
                    first = min(first, lost.step)  # before this run resumed the training
                if lost.step < first or (lost.step > first and kept is None):
                    raise
                self._has_left = False
                position = start if kept is None else kept
                history.forget(lost.step, position.epoch)

    def _train_epoch(
        self, options: FitOptions, position: DataPosition, history: History
    ) -> DataPosition:
        """Train from a position to the end of its epoch and evaluate; return the next position."""
        batches = options.training.batches(
            position.batch_size,
            seed=position.seed,
            epoch=position.epoch,
            shuffle=position.shuffle,
            drop_last=has_fixed_rows(self._manifest.phase(TRAIN).data),
        )
        joins, is_due = self._runner.terms.joins, False
        for batch in itertools.islice(batches, position.batch, None):
            if is_due and joins:
                self._checkpoint(options, position)
            rate = self._find_rate(options, position)
            position = msgspec.structs.replace(position, batch=position.batch + 1)
            record = self._record_step(batch, position, rate)
            history.steps.append(record)
            if options.on_step is not None:
                options.on_step(record)
            position, ends_round = self._share_if_due(position, record)
            is_due = ends_round or self._ends_interval(options, record)
            # a checkpoint before a leaving share would be mistaken for one of the state after it
            if is_due and not joins:
                self._checkpoint(options, position)
            if self._is_complete(position):
                break
        if self._is_complete(position) or position.epoch + 1 == options.epochs:
            position = self._leave(options, position)
        elif is_due and joins:
            self._checkpoint(options, position)
        if options.held_out is not None:
            evaluation = self._record_evaluation(options, options.held_out, position)
            history.evaluations.append(evaluation)
            if options.on_epoch is not None:
                options.on_epoch(evaluation)
            return self._judge(options, evaluation, position)
        return _begin_next_epoch(position)

    def _join_others(self, options: FitOptions, position: DataPosition) -> DataPosition:
        """Before a session's first step, receive the model that all clients continue from.

        A checkpoint comes first, if any are written: a client that is killed while it waits would
        otherwise return as another one, and the others would wait for the one that is gone.
        """
        if not (self._runner.terms.joins and self._runner.is_at_start):
            return position
        self._checkpoint(options, position)
        position = _note_round(position, self._runner.share(0, leaves=False))
        if self._is_complete(position):
            _logger.warning(
                "the server's %d rounds are complete: this client receives the joint model, and "
                "trains no step; to train on, start the server again without --resume",
                self._runner.terms.rounds,
            )
        return position

    def _share_if_due(
        self, position: DataPosition, record: StepRecord
    ) -> tuple[DataPosition, bool]:
        """Share after a step if a round of steps is over; return the position, and whether it is.

        A server that does not join what its clients learn has no rounds.
        """
        terms = self._runner.terms
        if not terms.joins:
            return position, False
        position = msgspec.structs.replace(
            position,
            unshared_steps=position.unshared_steps + 1,
            unshared_samples=position.unshared_samples + record.samples,
        )
        if position.unshared_steps < terms.local_steps:
            return position, False
        number = self._runner.share(position.unshared_samples, leaves=False)
        return _note_round(position, number), True

    def _leave(self, options: FitOptions, position: DataPosition) -> DataPosition:
        """Share for the last time, so that the other clients stop waiting for this one.

        A checkpoint follows, if any are written: a client or server that is killed before the
        outcome is saved would otherwise return to the state that this share replaced.
        """
        if self._has_left or not self._runner.terms.joins:
            return position
        number = self._runner.share(position.unshared_samples, leaves=True)
        self._has_left = True
        position = _note_round(position, number)
        self._checkpoint(options, position)
        return position

    def _ends_interval(self, options: FitOptions, record: StepRecord) -> bool:
        """Return whether a checkpoint is due after a step within a round or without rounds."""
        if self._runner.terms.policy in ONE_MODEL:
            return False  # only the end of a round can be restored
        return record.step % (options.checkpoint_every or 1) == 0

    def _checkpoint(self, options: FitOptions, position: DataPosition) -> None:
        """Make both sides write a checkpoint, if any are written."""
        if options.checkpoint_every is not None:
            self._runner.checkpoint(position, options.when_unsaved)

    def _is_complete(self, position: DataPosition) -> bool:
        """Return whether the rounds that the server asks for are over."""
        return 0 < self._runner.terms.rounds <= position.round

    def _is_over(self, options: FitOptions, position: DataPosition) -> bool:
        """Return whether training ends at a position."""
        is_done = self._is_complete(position) or position.epoch >= options.epochs
        return is_done or _has_stopped(options, position)

    def _judge(
        self, options: FitOptions, evaluation: Evaluation, position: DataPosition
    ) -> DataPosition:
        """Keep the state on both sides if it is the best so far; return the next position."""
        following = _begin_next_epoch(position)
        stopping, best = options.stopping, position.best
        if stopping is None:
            return following
        value = evaluation.metrics[stopping.metric]
        if best is None and math.isnan(value) and stopping.metric in self._told:
            reason = self._told[stopping.metric]
            raise UnusableData(
                "the data for evaluation",
                f"training is to stop by the metric '{stopping.metric}', which is not defined for "
                f"them: {reason}",
            )
        if best is None or stopping.is_better(value, best.value):
            newest = Best(
                epoch=evaluation.epoch,
                step=self._executor.step,
                value=value if math.isfinite(value) else None,
            )
            better = msgspec.structs.replace(following, best=newest)
            is_kept = self._runner.checkpoint(better, options.when_unsaved, keep=True)
            return better if is_kept else following
        waiting = msgspec.structs.replace(best, waited=best.waited + 1)
        return msgspec.structs.replace(following, best=waiting)

    def _return_to_best(
        self, options: FitOptions, position: DataPosition, history: History
    ) -> DataPosition:
        """Make both sides go back to the best state, and return the position after the last epoch.

        After that position, a run that is resumed makes no further steps.
        """
        history.best = position.best
        if position.best is None:
            return position
        if position.best.step != self._executor.step:
            self._runner.return_to(position.best.step)
        return msgspec.structs.replace(position, epoch=max(position.epoch, options.epochs))

    def _record_step(
        self, batch: Batch, position: DataPosition, learning_rate: float
    ) -> StepRecord:
        up, down = self._runner.traffic
        start = time.perf_counter()
        results = self._runner.train(batch, learning_rate, position.accumulate)
        seconds = time.perf_counter() - start
        sent, received = self._runner.traffic
        metrics = {name: float(array) for name, array in results.items() if array.ndim == 0}
        return StepRecord(
            step=self._executor.step,
            epoch=position.epoch,
            batch=position.batch,
            loss=metrics.pop(LOSS),
            metrics=metrics,
            learning_rate=learning_rate,
            samples=count_samples(self._manifest, TRAIN, batch),
            seconds=seconds,
            bytes_up=sent - up,
            bytes_down=received - down,
        )

    def _record_evaluation(
        self, options: FitOptions, dataset: Dataset, position: DataPosition
    ) -> Evaluation:
        start = time.perf_counter()
        rows = count_rows(position.batch_size, position.accumulate)
        metrics = self.evaluate(dataset, rows, options.metrics)
        seconds = time.perf_counter() - start
        return Evaluation(epoch=position.epoch, metrics=metrics, seconds=seconds)

    def evaluate(
        self, dataset: Dataset, batch_size: int, metrics: Sequence[Metric] = ()
    ) -> dict[str, float]:
        """Return the mean of each result over all samples of a dataset, and the metrics.

        Batches weigh by what counted in them (:func:`evaluations.evaluate`).  A metric that the
        dataset does not define is NaN, and a warning says why.
        """
        batches = dataset.batches(batch_size, seed=self._seed, epoch=0, shuffle=False)
        tasks = evaluate(self._manifest, batches, metrics)
        found = advance(tasks)
        while isinstance(found, EvaluationTask):
            found = advance(tasks, self.perform(found.phase, found.data))
        warn_of_undefined(found, self._told)
        return found.numbers

    def perform(
        self, phase: str, data: Batch, learning_rate: LearningRate = None
    ) -> dict[str, np.ndarray]:
        """Run one task of the given phase on a batch, and return the results of the task.

        ``learning_rate`` is a number, or a function that computes the rate from the number of steps
        so far; ``None`` means the optimizer's own learning rate.
        """
        return self._runner.perform(phase, data, self._choose_rate(learning_rate))

    def step(
        self, batch: Batch, learning_rate: LearningRate, accumulate: int
    ) -> dict[str, np.ndarray]:
        """Perform one training step of at most ``accumulate`` micro-batches on a batch."""
        return self._runner.train(batch, self._choose_rate(learning_rate), accumulate)

    def predict(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return the model's outputs, without what only an evaluation reads."""
        return select_outputs(self._manifest, self.perform(PREDICT, batch))

    def _choose_rate(self, given: LearningRate) -> float:
        return choose_rate(self._manifest, given, self._executor.step)

    def _find_rate(self, options: FitOptions, position: DataPosition) -> float:
        """Return the learning rate of the step that begins at a position in the data."""
        rate = self._choose_rate(options.learning_rate)
        if options.rates is None:
            return rate
        return rate * options.rates.get_factor(position.epoch, position.batch)


def warn_of_undefined(results: EvaluationResults, told: dict[str, str]) -> None:
    """Log why metrics are not defined, unless ``told`` has the reason; then add it there."""
    for name, value in results.metrics.items():
        if value.reason and told.get(name) != value.reason:
            told[name] = value.reason
            _logger.warning("the metric %s is not defined: %s", name, value.reason)


def select_outputs(
    manifest: PartyManifest, results: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the model's outputs, without what only an evaluation reads."""
    names = {spec.name for spec in manifest.outputs} or results.keys()
    return {name: array for name, array in results.items() if name in names}


def choose_rate(manifest: PartyManifest, given: LearningRate, step: int) -> float:
    """Return the learning rate of a step; by default, it is the optimizer's own."""
    rate = given(step) if callable(given) else given
    return manifest.learning_rate if rate is None else float(rate)


def _is_before(one: DataPosition, other: DataPosition) -> bool:
    """Return whether a position comes before another one in the same data."""
    if (one.epoch, one.batch) >= (other.epoch, other.batch):
        return False
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("batch_size", "accumulate", "seed", "shuffle", "samples", "schedule")
    )


def _begin_next_epoch(position: DataPosition) -> DataPosition:
    return msgspec.structs.replace(position, epoch=position.epoch + 1, batch=0)


def _note_round(position: DataPosition, number: int) -> DataPosition:
    """Return the position after joined parameters were received."""
    return msgspec.structs.replace(position, unshared_steps=0, unshared_samples=0, round=number)


def _has_stopped(options: FitOptions, position: DataPosition) -> bool:
    """Return whether training stops early at a position."""
    stopping, best = options.stopping, position.best
    return stopping is not None and best is not None and stopping.is_over(best.waited)
