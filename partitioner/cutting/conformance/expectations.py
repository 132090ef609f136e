"""Find out what the model given computes for drawn inputs, by two independent evaluators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import onnx

from splitonnx.partitioner.cutting.conformance.dataflow import (
    NotRun,
    run_reference,
    run_session,
)
from splitonnx.partitioner.cutting.conformance.measures import Difference, find_largest
from splitonnx.partitioner.cutting.conformance.originals import iter_nodes
from splitonnx.partitioner.cutting.conformance.samples import Arrays, iter_draws

EXACT = 1e-5
"""Relative difference up to which results count as equal, unless rounding exceeds it."""
COARSE = 2e-2
"""The same for a model that computes with 16 bits or with quantized numbers."""
_NOISE_FACTOR = 20
"""Allowed difference, as a multiple of the one between the two evaluators."""
_CONTRADICTION = 1e-2
"""Relative difference from which on the two evaluators contradict each other."""
_COARSE_TYPES = frozenset({onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})
_COARSE_OPERATORS = frozenset(
    {"ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QuantizeLinear"}
)
_MOST_REFERENCE = 64 << 20
"""The largest model in bytes for the reference evaluator, which is slow."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a model computes for some batches, according to one or both evaluators.

    ``reference`` is the result of onnx's reference evaluator and ``session`` that of an ONNX
    Runtime session without optimizations.
    """

    model: onnx.ModelProto
    batches: Sequence[Arrays]
    reference: Sequence[Arrays] | None
    session: Sequence[Arrays] | None

    @cached_property
    def noise(self) -> float:
        """Return the largest difference of the two evaluators, or 0 if only one could run."""
        if self.reference is None or self.session is None:
            return 0.0
        return find_largest(self.reference, self.session).size

    @property
    def is_contradictory(self) -> bool:
        """Return whether the two evaluators say different things, so that one of them is wrong."""
        return self.noise > _CONTRADICTION

    @cached_property
    def allowed(self) -> float:
        """Return the relative difference that rounding can explain."""
        least = COARSE if _is_coarse(self.model) else EXACT
        return least if self.is_contradictory else max(least, _NOISE_FACTOR * self.noise)

    def find_difference(self, found: Sequence[Arrays]) -> Difference:
        """Return the largest difference from what an evaluator says.

        If the evaluators contradict each other, the one that is closer decides.
        """
        outcomes = [made for made in (self.reference, self.session) if made is not None]
        differences = [find_largest(outcome, found) for outcome in outcomes]
        return min(differences, key=lambda difference: difference.size)


def expect(model: onnx.ModelProto, subject: str, seed: int) -> Expectation:
    """Draw inputs that a model accepts, and evaluate it with them.

    Raises:
        NotRun: no evaluator accepts any of the draws.
    """
    content = model.SerializeToString()
    runs: dict[str, Callable[[Sequence[Arrays]], list[Arrays]]] = {
        "session": partial(run_session, content, subject=subject, level="none")
    }
    if len(content) <= _MOST_REFERENCE:
        runs["reference"] = partial(run_reference, content, subject=subject)
    refusal = NotRun("no input could be drawn for its inputs' types")
    for batches in iter_draws(model, seed):
        made: dict[str, list[Arrays]] = {}
        for name, run in runs.items():
            try:
                made[name] = run(batches)
            except NotRun as error:
                refusal = error
        if made:
            return Expectation(
                model=model,
                batches=batches,
                reference=made.get("reference"),
                session=made.get("session"),
            )
    raise refusal


def _is_coarse(model: onnx.ModelProto) -> bool:
    tensors = [tensor.data_type for tensor in model.graph.initializer]
    inputs = [value.type.tensor_type.elem_type for value in model.graph.input]
    casts = [
        attribute.i
        for node in iter_nodes(model.graph)
        if node.op_type == "Cast"
        for attribute in node.attribute
        if attribute.name == "to"
    ]
    if _COARSE_TYPES.intersection([*tensors, *inputs, *casts]):
        return True
    return any(node.op_type in _COARSE_OPERATORS for node in iter_nodes(model.graph))
