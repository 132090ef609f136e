"""What the client's methods are asked for: checks of it, and the options of ``fit``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeAlias

from splitonnx.errors import UnusableData, UsageError
from splitonnx.manifests import PartyManifest, Phase, Role
from splitonnx.micro_batches import enlarge
from splitonnx.names import CLIENT, COUNTED, EVALUATE, PREDICT, TOTAL, TRAIN, WEIGHT
from splitonnx.runtime.client.datasets import Batch, Dataset, DataSource, open_dataset
from splitonnx.runtime.client.histories import Evaluation, StepRecord
from splitonnx.runtime.client.metrics.choices import Metric, choose_metrics
from splitonnx.runtime.client.runners import WhenUnsaved
from splitonnx.runtime.storage.positions import DataPosition
from splitonnx.sample_axes import find_sample_axis
from splitonnx.schedules import RatePlan, Schedule, plan_rates
from splitonnx.stopping import EarlyStopping
from splitonnx.tensors import TensorSpec

LearningRate: TypeAlias = float | Callable[[int], float] | None
"""A constant, a function of the number of updates so far, or ``None`` for the optimizer's rate."""


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """The options of :meth:`Client.fit`; see that method for their meaning.

    ``training`` is that method's ``data``, ``held_out`` is its ``eval_data``, and ``rates`` is its
    ``schedule``, fitted to the length of the run.  An evaluation computes ``metrics``, too.
    """

    training: Dataset
    held_out: Dataset | None
    metrics: Sequence[Metric] = ()
    epochs: int
    learning_rate: LearningRate
    rates: RatePlan | None
    stopping: EarlyStopping | None
    checkpoint_every: int | None
    when_unsaved: WhenUnsaved
    save: bool
    on_step: Callable[[StepRecord], None] | None
    on_epoch: Callable[[Evaluation], None] | None

    def find_start(self, sizes: tuple[int, int], *, seed: int, shuffle: bool) -> DataPosition:
        """Return the position in the data at which a new run begins.

        ``sizes`` are the rows of a batch, and the number of micro-batches that it is divided into.
        """
        return DataPosition(
            epoch=0,
            batch=0,
            batch_size=sizes[0],
            seed=seed,
            shuffle=shuffle,
            samples=self.training.size,
            accumulate=sizes[1],
            schedule="" if self.rates is None else str(self.rates),
            stopping="" if self.stopping is None else str(self.stopping),
        )


def check_client(manifest: PartyManifest, *, has_server: bool, seed: int) -> None:
    """Check that a part is the client's, and that a server was named if it needs one.

    Raises:
        UsageError: the part is another party's, ``has_server`` is wrong, or the seed is negative.
    """
    if seed < 0:
        raise UsageError(f"the seed must not be negative, not {seed}")
    if manifest.party != CLIENT:
        raise UsageError(f"this is the {manifest.party}'s part; name the client's folder")
    if has_server != any(phase.wires for phase in manifest.phases):
        raise UsageError(
            "this model was left whole and has no part for a server"
            if has_server
            else "this bundle is one part of a model; name the server that holds the other"
        )


def list_kept(manifest: PartyManifest) -> frozenset[str]:
    """Return the names of what both parts of a model keep from step to step."""
    return frozenset(spec.tensor.name for spec in manifest.state).union(manifest.remote_states)


def require_positive(**counts: int | None) -> None:
    """Check that each argument is ``None`` or at least 1.

    Raises:
        UsageError: an argument is less than 1; the error names the argument.
    """
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UsageError(f"{name} must be at least 1, not {count}")


def count_rows(batch_size: int, accumulate: int) -> int:
    """Return the number of rows of the largest micro-batch."""
    return -(-batch_size // accumulate)


def has_fixed_rows(specs: Sequence[TensorSpec]) -> bool:
    """Return whether an array has a fixed number of rows, so that smaller batches do not fit."""
    return _find_fixed_rows(specs) is not None


def _find_fixed_rows(specs: Sequence[TensorSpec]) -> tuple[str, int] | None:
    """Return the first array that has a fixed number of rows, with this number."""
    sizes = ((spec.name, size) for spec in specs for size in spec.shape[:1])
    return next(((name, size) for name, size in sizes if isinstance(size, int)), None)


def has_batch_states(manifest: PartyManifest) -> bool:
    """Return whether a state that the model hands itself may hold the fixed batch of the data.

    A state's shape is fixed, so such a model cannot be cut with a batch of any size.  The client
    does not know the shapes of the server's states, so each of them may hold the batch.
    """
    data = [spec for phase in manifest.phases for spec in phase.data]
    rows = {size for spec in data for size in spec.shape[:1] if isinstance(size, int)}
    buffers = [state.tensor for state in manifest.state if state.role is Role.BUFFER]
    held = {size for tensor in buffers for size in tensor.shape}
    return bool(manifest.remote_states or rows & held)


def open_run(
    manifest: PartyManifest,
    sources: tuple[DataSource, DataSource | None],
    sizes: tuple[int, int],
    kept: Collection[str],
) -> tuple[Dataset, Dataset | None]:
    """Open the data of a training run and, if there are any, those to evaluate on.

    ``sizes`` are the rows of a batch, and the number of micro-batches that it is divided into.
    Evaluations have batches of the size of a micro-batch, as these fit the memory.

    Raises:
        DataError, UsageError: see :func:`open_fitting`.
    """
    (data, eval_data), (batch_size, accumulate) = sources, sizes
    free, specs = not has_batch_states(manifest), require_phase(manifest, TRAIN).data
    training = open_fitting(
        data, specs, batch_size, kept, is_training=True, can_free=free, accumulate=accumulate
    )
    if eval_data is None:
        return training, None
    rows = count_rows(batch_size, accumulate)
    return training, open_whole(manifest, eval_data, EVALUATE, rows, kept)


def open_whole(
    manifest: PartyManifest, data: DataSource, phase: str, rows: int, kept: Collection[str]
) -> Dataset:
    """Open data to predict from or to evaluate on, in batches of ``rows``; none is left out.

    Raises:
        DataError, UsageError: see :func:`open_fitting`.
    """
    is_measured = phase == EVALUATE
    specs = list_evaluated(manifest) if is_measured else require_phase(manifest, phase).data
    return open_fitting(data, specs, rows, kept, can_free=not has_batch_states(manifest))


def open_fitting(
    source: DataSource,
    specs: Sequence[TensorSpec],
    batch_size: int,
    kept: Collection[str] = (),
    *,
    is_training: bool = False,
    can_free: bool = True,
    accumulate: int = 1,
) -> Dataset:
    """Open data, and check them and their division into batches against ``specs``.

    ``kept`` names tensors that the model keeps itself, which cannot be part of the data.
    ``can_free`` is whether another cut of the model can free its batch, which errors advise then.
    Batches to train with are divided into ``accumulate`` micro-batches, which fit ``specs``.

    Raises:
        DataError: the data do not fit ``specs``, or some batches of them do not.
        UsageError: the model fixes another batch size.
    """
    dataset = open_dataset(source)
    dataset.check(enlarge(specs, accumulate), kept)
    if dataset.size is not None and not dataset.has_own_batches:
        if is_training or dataset.size > batch_size:
            _check_axes(specs)
        _check_rows(
            dataset.size,
            specs,
            batch_size,
            is_training=is_training,
            can_free=can_free,
            accumulate=accumulate,
        )
    return dataset


def _check_axes(specs: Sequence[TensorSpec]) -> None:
    """Check that no array has its samples on another axis than the first, which is divided."""
    for spec in specs:
        axis = find_sample_axis(spec, specs)
        if axis and isinstance(spec.shape[0], int):
            raise UnusableData(
                "the data",
                f"the samples of '{spec.name}', {spec}, are on axis {axis}, but arrays are divided "
                "into batches along their first; save each batch as one .npz file in a folder (in "
                "Python: pass a list of batches)",
            )


def _check_rows(
    size: int,
    specs: Sequence[TensorSpec],
    batch_size: int,
    *,
    is_training: bool,
    can_free: bool,
    accumulate: int,
) -> None:
    """Check that all batches have the number of rows that an array fixes, if one does.

    Training skips a smaller last batch, but needs at least one batch.
    """
    name, rows = _find_fixed_rows(specs) or ("", 0)
    cause = f"the model fixes its batch at {rows} rows, in '{name}'"
    if accumulate > 1:
        rows *= accumulate
        cause = f"{cause}, so {accumulate} micro-batches have {rows}"
    advice = f", or cut the model with --dim {name}:0=N, which frees its batch" if can_free else ""
    if not rows or (size == rows and batch_size >= rows and not is_training):
        return
    if size < rows:
        raise UnusableData(
            "the data",
            f"{cause}, and there are only {size} rows; give {rows} or more{advice}",
        )
    if batch_size != rows:
        raise UsageError(f"{cause}; use batch_size={rows} (--batch-size {rows}){advice}")
    if size % rows and not is_training:
        raise UnusableData(
            "the data",
            f"{cause}, and {size} rows leave a last batch of {size % rows}; give a multiple of "
            f"{rows}{advice}",
        )


def fit_schedule(
    schedule: Schedule | None,
    learning_rate: LearningRate,
    training: Dataset,
    specs: Sequence[TensorSpec],
    *,
    epochs: int,
    batch_size: int,
) -> RatePlan | None:
    """Fit a schedule to the length of a run; ``specs`` are the arrays that a step needs.

    Raises:
        UsageError: the learning rate is a function, the number of steps is not known in advance,
            or the warmup is not shorter than the run.
    """
    if schedule is None:
        return None
    if callable(learning_rate):
        raise UsageError("a schedule needs a learning rate that is a number, not a function")
    batches = training.count_batches(batch_size, drop_last=has_fixed_rows(specs))
    if batches is None:
        raise UsageError(
            "a schedule needs data whose number of batches is known; without, compute the "
            "learning rate with a function of the step"
        )
    return plan_rates(schedule, epochs=epochs, steps_per_epoch=batches)


def choose_measures(
    manifest: PartyManifest,
    names: Sequence[str],
    stopping: EarlyStopping | None,
    *,
    has_data: bool,
    can_return: bool,
) -> tuple[Metric, ...]:
    """Return the metrics of a run's evaluations, after checks of them and of early stopping.

    ``names`` are the metrics that the user asks for; ``has_data`` says whether there are data to
    evaluate on, and ``can_return`` whether both sides can go back to an earlier step.

    Raises:
        UsageError: the metrics or early stopping do not fit the bundle or the run.
    """
    metrics = choose_metrics(names, manifest)
    if metrics and not has_data:
        raise UsageError("metrics need data to evaluate on: pass eval_data (--eval-data)")
    results = [*manifest.phase(EVALUATE).results, *(metric.name for metric in metrics)]
    hidden = (COUNTED, TOTAL, WEIGHT)
    told = [name for name in dict.fromkeys(results) if not name.endswith(hidden)]
    check_stopping(stopping, told if has_data else (), can_return=can_return)
    return metrics


def check_stopping(
    stopping: EarlyStopping | None, metrics: Sequence[str], *, can_return: bool
) -> None:
    """Check that evaluations have the metric of early stopping, and that both sides can go back.

    ``metrics`` are the numbers that an evaluation computes; without evaluations there are none.

    Raises:
        UsageError: there are no evaluations, they do not compute that metric, or the client has
            only a given connection.
    """
    if stopping is None:
        return
    if not can_return:
        raise UsageError("early stopping needs a server's URL or a function that connects")
    if not metrics:
        raise UsageError("early stopping needs data to evaluate on: pass eval_data (--eval-data)")
    if stopping.metric not in metrics:
        raise UsageError(
            f"there is no metric '{stopping.metric}' to stop by; an evaluation has "
            f"{', '.join(metrics)}; others are named with metrics (--metric)"
        )


def require_phase(manifest: PartyManifest, name: str) -> Phase:
    """Return a phase of a manifest.

    Raises:
        UsageError: the bundle has no such phase.
    """
    phase = manifest.phase(name)
    if not (phase.stages or phase.wires):
        raise UsageError(f"this bundle has nothing to {name} with")
    return phase


def list_evaluated(manifest: PartyManifest) -> list[TensorSpec]:
    """List the arrays that an evaluation needs: those to predict from, and the labels.

    Raises:
        UsageError: the bundle cannot be evaluated.
    """
    predicted = require_phase(manifest, PREDICT)
    measured = require_phase(manifest, EVALUATE).data
    return [*predicted.data, *(spec for spec in measured if spec.name not in predicted.results)]


def plan_joining(
    manifest: PartyManifest, dataset: Dataset, batches: Iterator[Batch]
) -> tuple[Iterator[Batch], dict[str, int]]:
    """Return the batches of a prediction, and by output the axis along which they are joined.

    Raises:
        UsageError: there are several batches, and an output has no axis that counts the samples, or
            more than one.
    """
    specs = manifest.phase(PREDICT).data
    axes: dict[str, int] = {}
    for output in manifest.outputs:
        axis = find_sample_axis(output, specs, has_own_batches=dataset.has_own_batches)
        if axis is None:  # two batches are read in advance, before anything is computed
            first = list(islice(batches, 2))
            batches = chain(first, batches)
            if len(first) > 1:
                raise UsageError(_explain_unjoinable(output, specs, dataset))
        axes[output.name] = axis or 0
    return batches, axes


def _explain_unjoinable(output: TensorSpec, specs: Sequence[TensorSpec], dataset: Dataset) -> str:
    name, rows = _find_fixed_rows(specs) or ("", 0)
    cause = (
        f"the output '{output.name}', {output}, does not have exactly one axis that counts the "
        "samples, so several batches of it cannot be joined"
    )
    if dataset.has_own_batches:
        return f"{cause}; take them one by one with predict_batches"
    if rows:
        return (
            f"{cause}; predict {rows} rows at a time, as many as the model fixes, or cut the model "
            f"with --dim {name}:0=N, which frees its batch, and predict all rows in one"
        )
    return (
        f"{cause}; predict all rows in one, with batch_size={dataset.size} (--batch-size "
        f"{dataset.size}) or larger"
    )
