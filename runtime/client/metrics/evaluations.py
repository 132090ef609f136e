"""The evaluation of a model, task by task, for clients that wait in different ways.

Where the tasks run is not known here: the caller runs them and sends their results in.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from splitonnx.disclosures import list_labels
from splitonnx.manifests import PartyManifest
from splitonnx.names import EVALUATE, PREDICT
from splitonnx.runtime.client.metrics.accumulators import MetricValue
from splitonnx.runtime.client.metrics.choices import Metric
from splitonnx.runtime.client.metrics.dataset_means import DatasetMeans
from splitonnx.runtime.client.metrics.metric_sets import MetricSet


@dataclass(frozen=True, kw_only=True)
class EvaluationTask:
    """A task of an evaluation: its phase and its arrays."""

    phase: str
    data: Mapping[str, np.ndarray] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class EvaluationResults:
    """The mean of each result over all samples, and the metrics."""

    means: Mapping[str, float]
    metrics: Mapping[str, MetricValue]

    @property
    def numbers(self) -> dict[str, float]:
        """Return all numbers by their names."""
        return {**self.means, **{name: value.value for name, value in self.metrics.items()}}


def evaluate(
    manifest: PartyManifest,
    batches: Iterable[Mapping[str, np.ndarray]],
    metrics: Sequence[Metric] = (),
) -> Generator[EvaluationTask, Mapping[str, np.ndarray], EvaluationResults]:
    """Yield the tasks of an evaluation, receive the results of each, and return the numbers.

    Batches weigh by what counted in them (:class:`DatasetMeans`).
    """
    means = DatasetMeans()
    chosen = MetricSet(metrics)
    for batch in batches:
        outputs = yield EvaluationTask(phase=PREDICT, data=batch)
        results = yield EvaluationTask(phase=EVALUATE, data={**batch, **outputs})
        means.add({name: float(v) for name, v in results.items()}, _weigh(manifest, batch))
        chosen.add(batch, outputs)
    return EvaluationResults(means=means.compute(), metrics=chosen.compute())


def advance(
    tasks: Generator[EvaluationTask, Mapping[str, np.ndarray], EvaluationResults],
    results: Mapping[str, np.ndarray] | None = None,
) -> EvaluationTask | EvaluationResults:
    """Return the next task of :func:`evaluate`, or its end, after the ``results`` of the last."""
    try:
        return next(tasks) if results is None else tasks.send(results)
    except StopIteration as end:
        numbers: EvaluationResults = end.value
        return numbers


def count_samples(manifest: PartyManifest, phase: str, batch: Mapping[str, np.ndarray]) -> int:
    """Count the rows of the labels, or of the first input if there are none."""
    labels = list_labels(manifest)
    name = labels[0] if labels else manifest.phase(phase).data[0].name
    return len(np.atleast_1d(batch[name]))


def _weigh(manifest: PartyManifest, batch: Mapping[str, np.ndarray]) -> int:
    """Count the labels, or the samples if there are no labels."""
    labels = list_labels(manifest)
    return batch[labels[0]].size if labels else count_samples(manifest, PREDICT, batch)
