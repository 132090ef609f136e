"""Compare the gradients that are used to train an exported model with the network's gradients.

A ``detach``, a ``torch.no_grad`` block and the ``backward`` of a custom function change gradients
but not results, and exporters do not write them.  Therefore an exported model may compute the same
results as the network, and yet be trained differently.

The gradients are those of one number: the sum of all outputs, each multiplied by random numbers.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from splitonnx.errors import SplitonnxError, WrongExport, flatten, list_some
from splitonnx.losses import FROM_MODEL, Loss
from splitonnx.partitioner.cutting.conformance.dataflow import NotRun, run_session
from splitonnx.partitioner.cutting.conformance.samples import Arrays
from splitonnx.partitioner.cutting.joints import JointGraph, build_training
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.graphs.transcripts import write_graph
from splitonnx.partitioner.normalization.weights import read_array
from splitonnx.torch.examples import Example
from splitonnx.torch.gradients.trials import Trial, list_trials
from splitonnx.torch.networks import Layout

TOLERATED = 1e-3
"""The difference, relative to the largest gradient of a parameter, that rounding may explain."""
_FLOOR = 1e-5
"""The same, relative to the largest gradient of all parameters.

A bias before BatchNormalization has a gradient of zero, of which rounding leaves a little.
"""
_NOISE = 30.0
"""The same, in multiples of what a rounding of the inputs changes in the network."""
_SUM = "projection"
_ADVICE = (
    "a gradient that the network stops or replaces is not in the file: write tensor.detach() for "
    "a torch.no_grad() block and for .data, and x + (f(x) - x).detach() for a custom "
    "autograd.Function with a straight-through gradient; the export keeps detach(), and no other "
    "custom gradient can be exported"
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """The result of comparing gradients.

    ``stop_gradients`` are the names of the tensors at which ``cut`` must stop gradients.
    ``difference`` is the largest relative difference that remains between the gradients, or
    ``None`` if they were not compared.
    """

    stop_gradients: tuple[str, ...] = ()
    difference: float | None = None


@dataclass(frozen=True, kw_only=True)
class Training:
    """An exported model, and the patterns of the parameters that ``cut`` freezes or trains."""

    model: onnx.ModelProto
    freeze: tuple[str, ...]
    train: tuple[str, ...]

    def prepare(self, stops: Sequence[str], *, is_training: bool) -> PreparedModel:
        """Prepare the model for differentiation, with dropout turned off.

        ``stops`` are the names of the tensors at which gradients are stopped.  If ``is_training``
        is false, each BatchNormalization uses its running statistics, as it does in evaluation.
        """
        return prepare(
            open_model(self.model),
            batchnorm=None if is_training else "frozen",
            dropout="off",
            train=self.train,
            freeze=self.freeze,
            stop_gradients=stops,
        )


def compare_gradients(
    torch: Any,
    network: Any,
    training: Training,
    example: Example,
    outputs: Sequence[str],
    layout: Layout,
    detached: Sequence[str],
) -> Agreement:
    """Compare the gradients of all parameters, and find the tensors at which to stop gradients.

    ``outputs`` are the names of the model's outputs.  ``detached`` are the names of the tensors
    through which the network passes no gradient (see :mod:`detachments`).  If the gradients cannot
    be compared, a warning is logged.

    Pass the network in the modes in which it is trained.  This function changes its modes and its
    running statistics, but not its parameters.

    The gradients are compared without dropout.  The parameters and inputs differ slightly from the
    given ones, because these may be at a point without a derivative, such as zero for ReLU.

    Raises:
        WrongExport: a gradient differs, although gradients are stopped at the detached tensors.
    """
    stops = _choose_stops(training, detached)
    trials = list_trials(torch, network, example, outputs)
    if not trials:
        _log.warning(
            "the gradients of the export were not compared: the network has none near the example, "
            "or not all are finite"
        )
        return Agreement(stop_gradients=stops)
    projected = dataclasses.replace(training, model=_project(training.model, trials[0]))
    try:
        differences = _measure(projected, stops, trials, layout)
    except (SplitonnxError, NotRun) as error:
        _log.warning("the gradients of the export were not compared: %s", flatten(str(error)))
        return Agreement(stop_gradients=stops)
    wrong = _list_wrong(differences)
    if not wrong:
        largest = max(differences.values(), default=0.0)
        return Agreement(stop_gradients=stops, difference=largest)
    raise WrongExport(
        type(network).__name__,
        f"the gradient of {list_some(wrong)}",
        "the network's",
        f"another one by {max(differences[name] for name in wrong):.1e}",
        _ADVICE,
    )


def _list_wrong(differences: Mapping[str, float]) -> list[str]:
    return [name for name, size in differences.items() if not size <= TOLERATED]


def _choose_stops(training: Training, detached: Sequence[str]) -> tuple[str, ...]:
    """Return the detached tensors through which a gradient would pass to a parameter."""
    chosen: list[str] = []
    for name in detached:
        try:
            training.prepare([*chosen, name], is_training=True)
        except SplitonnxError:
            continue
        chosen.append(name)
    return tuple(chosen)


def _project(model: onnx.ModelProto, trial: Trial) -> onnx.ModelProto:
    """Return a copy that also computes the sum of its outputs, each times an added input."""
    projected = onnx.ModelProto()
    projected.CopyFrom(model)
    graph = projected.graph
    declared = {value.name: value for value in graph.output}
    terms = []
    for at, name in enumerate(trial.directions):
        factor, term = f"{_SUM}.factor_{at}", f"{_SUM}.term_{at}"
        shape = declared[name].type.tensor_type.shape
        given = helper.make_tensor_value_info(factor, TensorProto.FLOAT, None)
        given.type.tensor_type.shape.CopyFrom(shape)
        graph.input.append(given)
        graph.node.extend(
            [
                helper.make_node("Cast", [name], [f"{term}.cast"], to=TensorProto.FLOAT),
                helper.make_node("Mul", [f"{term}.cast", factor], [f"{term}.product"]),
                helper.make_node("ReduceSum", [f"{term}.product"], [term], keepdims=0),
            ]
        )
        terms.append(term)
    graph.node.append(helper.make_node("Sum", terms, [_SUM]))
    graph.output.append(helper.make_tensor_value_info(_SUM, TensorProto.FLOAT, []))
    return projected


def _measure(
    training: Training, stops: Sequence[str], trials: Sequence[Trial], layout: Layout
) -> dict[str, float]:
    """Return the relative difference of each gradient in the trial in which it is smallest."""
    prepared = training.prepare(stops, is_training=trials[0].is_training)
    joint = build_training(prepared, (), (), [Loss(kind=FROM_MODEL, output=_SUM)])
    smallest: dict[str, float] = {}
    for trial in trials:
        found = _compute(prepared, joint, trial, layout)
        for name, size in _compare(trial, found, layout).items():
            smallest[name] = min(size, smallest.get(name, np.inf))
        if not _list_wrong(smallest):
            break
    return smallest


def _compute(
    prepared: PreparedModel, joint: JointGraph, trial: Trial, layout: Layout
) -> dict[str, np.ndarray]:
    """Return the gradient of each parameter that the model trains."""
    read = {value.name: value for value in joint.graph.inputs}
    given: Arrays = {
        **trial.inputs,
        **{f"{_SUM}.factor_{at}": r for at, r in enumerate(trial.directions.values())},
    }
    for name, tensor in prepared.weights.items():
        stored = read_array(tensor)
        names = [other for other in layout.groups.get(name, ()) if other in trial.values]
        moved = trial.values[names[0]] if names else stored
        given[name] = moved.astype(stored.dtype)
    kept = {name: array for name, array in given.items() if name in read}
    content = write_graph(joint.graph, 10, "splitonnx").SerializeToString()
    (made,) = run_session(content, [kept], "the gradients of the export", level="none")
    return {name: made[gradient] for name, gradient in joint.gradients.items()}


def _compare(trial: Trial, found: Mapping[str, np.ndarray], layout: Layout) -> dict[str, float]:
    """Return the difference of each parameter's gradient, relative to what it may be at most.

    The results are scaled so that ``TOLERATED`` is the limit.  A parameter without a gradient has
    one of zero.
    """
    largest = max((float(np.abs(g).max(initial=0)) for g in trial.gradients.values()), default=0.0)
    sizes: dict[str, float] = {}
    for name, expected in trial.gradients.items():
        have = next((found[other] for other in layout.groups[name] if other in found), None)
        gap = np.abs(expected - (np.zeros_like(expected) if have is None else have))
        allowed = (
            TOLERATED * float(np.abs(expected).max(initial=0))
            + _FLOOR * largest
            + _NOISE * trial.noise[name]
        )
        size = float(gap.max(initial=0)) / max(allowed, 1e-30) * TOLERATED
        sizes[name] = size if np.isfinite(size) else np.inf
    return sizes
