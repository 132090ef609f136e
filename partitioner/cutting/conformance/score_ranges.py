"""Find scores that look like probabilities, however the model computes them.

The model is evaluated with random inputs, first with its own weights and then with other weights.
Raw scores leave the range from 0 to 1 for some of them, and probabilities never do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import onnx_ir as ir

from splitonnx.manifests import KEY
from splitonnx.partitioner.cutting.conformance.dataflow import NotRun, inline_weights, run_session
from splitonnx.partitioner.cutting.conformance.samples import Arrays, iter_draws
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.differentiation.activations.final_activations import (
    CONTAINED,
    find_activation,
)
from splitonnx.partitioner.differentiation.activations.score_bounds import bound_scores
from splitonnx.partitioner.differentiation.activations.squashings import find_repeated_activation
from splitonnx.partitioner.graphs.transcripts import write_model
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.normalization.weights import read_array

_MOVES = frozenset({"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_UNBOUNDED = frozenset({"Add", "Conv", "ConvTranspose", "Gemm", "MatMul", "Mul", "Sub"})
"""Operators whose results have no bounds if one of their inputs is a trained weight."""
_SEEDS = (0, 1)
_FACTORS = (1.0, 3.0, 10.0, 30.0)
"""Factors of the weights that are tried after the model's own, until results are not numbers."""
_LEAST_NOISE = 0.1
"""The least standard deviation of the noise that is added to weights, which may all be zero."""
_MOST_DRAWS = 12
"""Limit on the draws of inputs that are tried until the model accepts one."""
_LEAST_ELEMENTS = 20
"""The number of results, over all runs, below which nothing is concluded."""
_LEAST_SPREAD = 0.05
"""The distance of the largest result from the smallest below which nothing is concluded."""
_ROUNDING = 1e-4
_SUM_ROUNDING = 5e-3


def describe_probabilities(
    prepared: PreparedModel, loss: str, output: str, axis: int, most_bytes: int
) -> str:
    """Return under which conditions ``output`` is like probabilities, or an empty string.

    Only outputs to which ``loss`` applies a Softmax or a Sigmoid are examined, and only if no such
    activation was recognised by its operators.  ``axis`` is the axis of the classes.  A model whose
    weights take more than ``most_bytes`` is not examined.  If the model ends in a trained layer,
    its output is not like probabilities, unless the layer's current weights keep the results of an
    activation between 0 and 1.
    """
    if loss not in CONTAINED or _is_explained(prepared, loss, output, axis):
        return ""
    if _is_unbounded(map_values(prepared.inference.graph)[output], frozenset(prepared.trainable)):
        return _describe_bounds(prepared, output)
    if sum(tensor.nbytes for tensor in prepared.weights.values()) > most_bytes:
        return ""
    found: list[np.ndarray] = []
    try:
        for scores in _evaluate(prepared, output):
            if np.any((scores < -_ROUNDING) | (scores > 1 + _ROUNDING)):
                return ""
            found.append(scores)
    except NotRun:
        return ""
    known = np.concatenate([scores[~np.isnan(scores)] for scores in found])
    if known.size < _LEAST_ELEMENTS or np.ptp(known) < _LEAST_SPREAD:
        return ""
    has_sums = loss == "cross-entropy" and all(_sums_to_one(scores, axis) for scores in found)
    sums = " and sum to 1 over the classes" if has_sums else ""
    return f"with random inputs and weights, all its values lie between 0 and 1{sums}"


def _describe_bounds(prepared: PreparedModel, output: str) -> str:
    """Return what is true of an output if its trained weights keep it between 0 and 1."""

    def read(name: str) -> np.ndarray | None:
        return read_array(prepared.weights[name]) if name in prepared.weights else None

    bounds = bound_scores(map_values(prepared.skeleton.graph)[output], read)
    if bounds is None or not np.all((bounds.low > -_ROUNDING) & (bounds.high < 1 + _ROUNDING)):
        return ""
    if np.max(bounds.high - bounds.low) < _LEAST_SPREAD:
        return ""
    return (
        "as the weights behind its last activation are now, all its values lie between 0 and 1, "
        "whatever the inputs"
    )


def _is_explained(prepared: PreparedModel, loss: str, output: str, axis: int) -> bool:
    """Return whether the operators alone show what kind of scores an output holds."""
    given, trained, inferred = (
        map_values(form.graph).get(output)
        for form in (prepared.skeleton, prepared.training, prepared.inference)
    )
    if given is None or trained is None or inferred is None:
        return True
    if find_activation(trained, loss, axis) is not None:
        return True
    return find_repeated_activation(given, trained, loss, axis) is not None


def _is_unbounded(value: ir.Value, trained: frozenset[str]) -> bool:
    """Return whether a layer of trained weights computes a value, so that it has no bounds."""
    while (node := value.producer()) is not None and not node.domain:
        if node.op_type in _UNBOUNDED:
            return any(v is not None and _is_trained(v, trained) for v in node.inputs)
        if node.op_type not in _MOVES or node.inputs[0] is None:
            return False
        value = node.inputs[0]
    return False


def _is_trained(value: ir.Value, trained: frozenset[str]) -> bool:
    """Return whether a value is a trained weight, or one that was moved or converted."""
    while (node := value.producer()) is not None and node.op_type in _MOVES:
        if node.inputs[0] is None:
            return False
        value = node.inputs[0]
    return node is None and value.name in trained


def _evaluate(prepared: PreparedModel, output: str) -> Iterator[np.ndarray]:
    """Yield values of ``output`` for random inputs: with the model's own weights, then with others.

    The other weights become larger from run to run, and the last values are those before most are
    not numbers.

    Raises:
        NotRun: the model cannot be evaluated, or most results of the first runs are not numbers.
    """
    if any(value.name == KEY for value in prepared.inference.graph.inputs):
        raise NotRun("it draws random numbers")
    weights = {name: read_array(tensor) for name, tensor in prepared.weights.items()}
    batches, results = _draw(prepared, weights)
    yield from _select(results, output)
    for factor in _FACTORS:
        for seed in _SEEDS:
            varied = _vary(weights, prepared.trainable, factor, seed)
            made = list(_select(_run(prepared, varied, batches), output))
            if any(2 * np.isnan(scores).sum() > scores.size for scores in made):
                if factor == _FACTORS[0]:
                    raise NotRun("most of its results are not numbers")
                return
            yield from made


def _draw(
    prepared: PreparedModel, weights: Mapping[str, np.ndarray]
) -> tuple[list[Arrays], list[Arrays]]:
    """Return random batches that a model accepts, and its results for them."""
    model = inline_weights(write_model(prepared.inference), weights)
    refusal = NotRun("no input could be drawn for its inputs' types")
    for batches in islice(iter_draws(model, _SEEDS[0]), _MOST_DRAWS):
        try:
            return batches, _run(prepared, weights, batches)
        except NotRun as error:
            refusal = error
    raise refusal


def _run(
    prepared: PreparedModel, weights: Mapping[str, np.ndarray], batches: Sequence[Arrays]
) -> list[Arrays]:
    model = inline_weights(write_model(prepared.inference), weights)
    return run_session(model, batches, "the model", level="none")


def _select(results: Sequence[Arrays], output: str) -> Iterator[np.ndarray]:
    return (made[output].astype(np.float32) for made in results if made[output].size)


def _vary(
    weights: Mapping[str, np.ndarray], trained: Sequence[str], factor: float, seed: int
) -> dict[str, np.ndarray]:
    """Return weights to which noise at least as large was added, times ``factor``."""
    random = np.random.default_rng(seed)
    varied = dict(weights)
    for name in trained:
        own = weights[name].astype(np.float32)
        spread = max(float(own.std()), _LEAST_NOISE) if own.size else 0.0
        varied[name] = factor * (own + spread * random.standard_normal(own.shape))
    return varied


def _sums_to_one(scores: np.ndarray, axis: int) -> bool:
    sums = scores.sum(axis=axis)
    return bool(np.all(np.abs(sums[~np.isnan(sums)] - 1) < _SUM_ROUNDING))
