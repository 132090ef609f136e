"""What a node case's loss and gradients should be: central differences in float64.

The case is evaluated by onnx.reference as the onnx package wrote it.  Nothing of splitonnx and
nothing of ONNX Runtime takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx

from tests.support.node_cases import NodeCase, is_float, list_node_cases, list_results
from tests.support.oracles import differentiate_numerically, make_evaluator, to_double

ENTRIES = 10
"""Entries of each parameter that are differentiated."""
LARGE = 50_000
"""Elements from which on two entries do: the evaluator pools so many in loops that take seconds."""

Arrays = dict[str, np.ndarray]
Slopes = tuple[tuple[tuple[int, ...], float], ...]


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """The weights that a case is tried with, the loss there, and some of its derivatives."""

    weights: Arrays
    loss: float
    slopes: Mapping[str, Slopes]


def draw_data(case: NodeCase) -> Arrays:
    """Draw what each numeric output is multiplied with before all are summed to the loss."""
    random = np.random.default_rng(5)
    data: Arrays = {}
    for index, name in list_results(case):
        shape = case.outputs[name].shape
        factors = random.uniform(0.5, 1.5, shape).astype(np.float32)
        factors *= random.choice(np.array([-1.0, 1.0], np.float32), shape)
        data[f"case.weight{index}"] = factors
    return data


@cache
def expect(operator: str, name: str, parameters: tuple[str, ...]) -> Expectation:
    """Find what a case should come to, with ``parameters`` moved a little off its own values."""
    case = next(case for case in list_node_cases(operator) if case.name == name)
    weights, data = _draw_weights(case, parameters), draw_data(case)
    inputs = {**case.inputs, **{n: w.astype(np.float64) for n, w in weights.items()}}

    def measure() -> float:
        return _measure_loss(case, inputs, data)

    return Expectation(
        weights=weights,
        loss=measure(),
        slopes={parameter: _differentiate(measure, inputs[parameter]) for parameter in parameters},
    )


def _differentiate(measure: Callable[[], float], array: np.ndarray) -> Slopes:
    entries = ENTRIES if array.size < LARGE else 2
    return tuple(differentiate_numerically(measure, array, entries=entries))


def _draw_weights(case: NodeCase, parameters: Sequence[str]) -> Arrays:
    """Move every weight a little off the case's own value: away from ties, kinks and zeros."""
    random = np.random.default_rng(11)
    for width in (2e-2, 2e-3, 0.0):
        weights = {}
        for name in parameters:
            array = np.asarray(case.inputs[name], np.float64)
            shift = random.uniform(0.3, 1.0, array.shape) * random.choice([-1, 1], array.shape)
            weights[name] = (array + width * shift).astype(np.float32)
        if _is_inside(case, {**case.inputs, **weights}):
            break
    return weights


def _is_inside(case: NodeCase, inputs: Mapping[str, np.ndarray]) -> bool:
    """Whether the case is finite there, if it was finite where the onnx package put it."""
    outputs = [np.asarray(o) for o in evaluate(case, inputs)]
    return all(np.isfinite(o).all() for o in outputs if o.dtype.kind == "f")


def evaluate(case: NodeCase, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Evaluate a case in float64 by onnx.reference."""
    evaluator = _make_case_evaluator(case.operator, case.name)
    feeds = {n: np.asarray(a).astype(np.float64) if is_float(a) else a for n, a in inputs.items()}
    results = evaluator.run(None, feeds)
    assert isinstance(results, list)
    return results


@cache
def _make_case_evaluator(operator: str, name: str) -> onnx.reference.ReferenceEvaluator:
    case = next(case for case in list_node_cases(operator) if case.name == name)
    return make_evaluator(to_double(case.model))


def _measure_loss(
    case: NodeCase, inputs: Mapping[str, np.ndarray], data: Mapping[str, np.ndarray]
) -> float:
    total = 1.0  # the anchor
    outputs = evaluate(case, inputs)
    results = [outputs[index] for index, _ in list_results(case)]
    for result, weight in zip(results, data.values(), strict=True):
        total += float(np.sum(np.asarray(result).astype(np.float64) * weight.astype(np.float64)))
    return total
