"""Find out what the model given computes for drawn inputs, by two independent evaluators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import onnx

from splitonnx.partitioner.cutting.conformance.dataflow import (
    NotRun,
    run_reference,
    run_session,
)
from splitonnx.partitioner.cutting.conformance.measures import Difference, list_differences
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
_ROUNDING = 1e-6
"""Difference up to which rounding explains any relative one, as in a sum that cancels out."""
_SCALES = (10.0, 0.1, 100.0)
"""Sizes of inputs that are tried if those of a normal distribution tell nothing."""
_MOST_PARTIAL = 4
"""Draws of integers that only one evaluator accepts; smaller integers are tried until then."""
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

    @property
    def is_telling(self) -> bool:
        """Return whether an output has elements that differ, if any has more than one."""
        outcome = self.session or self.reference or ()
        several = [array for batch in outcome for array in batch.values() if array.size > 1]
        return not several or any(bool((array != array.flat[0]).any()) for array in several)

    @cached_property
    def noise(self) -> Mapping[str, Difference]:
        """Map each tensor to the largest difference of the two evaluators, if both could run."""
        if self.reference is None or self.session is None:
            return {}
        every = list_differences(self.reference, self.session)
        return {each.tensor: each for each in sorted(every, key=lambda each: each.size)}

    @property
    def contradicted(self) -> list[Difference]:
        """List the tensors of which the evaluators say different things, so that one is wrong."""
        return [each for each in self.noise.values() if _is_contradiction(each)]

    @property
    def cancelled(self) -> list[Difference]:
        """List the tensors of which rounding has left little, such as a sum that should be zero."""
        return [
            each
            for each in self.noise.values()
            if each.size > _CONTRADICTION and not _is_contradiction(each)
        ]

    @cached_property
    def least(self) -> float:
        """Return the relative difference that is allowed of every tensor."""
        return COARSE if _is_coarse(self.model) else EXACT

    def allow(self, tensor: str) -> float:
        """Return the relative difference of a tensor that rounding can explain."""
        noise = self.noise.get(tensor)
        if noise is None or _is_contradiction(noise):
            return self.least
        return max(self.least, _NOISE_FACTOR * noise.size)

    def find_missing(self, found: Sequence[Arrays]) -> list[str]:
        """List the outputs of the model that ``found`` does not have."""
        outcome = self.reference or self.session or ()
        lists = zip(outcome, found, strict=True)
        return list(dict.fromkeys(n for want, have in lists for n in want if n not in have))

    def find_difference(self, found: Sequence[Arrays]) -> Difference:
        """Return the largest difference from what an evaluator says, of those not allowed.

        Its size is 0 if there is none.  If the evaluators contradict each other, the one that is
        closer decides.
        """
        outcomes = [made for made in (self.reference, self.session) if made is not None]
        differences = [
            [
                each
                for each in list_differences(outcome, found)
                if each.size > self.allow(each.tensor)
            ]
            for outcome in outcomes
        ]
        none = Difference(tensor="", batch=0, size=0.0)
        largest = [max([none, *every], key=lambda each: each.size) for every in differences]
        return min(largest, key=lambda difference: difference.size)


def expect(model: onnx.ModelProto, subject: str, seed: int) -> Expectation:
    """Draw inputs that a model accepts, and evaluate it with them.

    If no output tells one element from another, as behind a Relu of negative numbers alone, inputs
    of other sizes are tried.

    Raises:
        NotRun: no evaluator accepts any of the draws.
    """
    first = _expect(model, subject, seed, 1.0)
    if first.is_telling:
        return first
    others = (_expect(model, subject, seed, scale) for scale in _SCALES)
    return next((other for other in others if other.is_telling), first)


def _expect(model: onnx.ModelProto, subject: str, seed: int, scale: float) -> Expectation:
    content = model.SerializeToString()
    runs: dict[str, Callable[[Sequence[Arrays]], list[Arrays]]] = {
        "session": partial(run_session, content, subject=subject, level="none")
    }
    if len(content) <= _MOST_REFERENCE:
        runs["reference"] = partial(run_reference, content, subject=subject)
    refusal = NotRun("no input could be drawn for its inputs' types")
    halves: list[Expectation] = []
    for batches in iter_draws(model, seed, scale):
        made: dict[str, list[Arrays]] = {}
        for name, run in runs.items():
            try:
                made[name] = run(batches)
            except NotRun as error:
                refusal = error
        if not made:
            continue
        found = Expectation(
            model=model,
            batches=batches,
            reference=made.get("reference"),
            session=made.get("session"),
        )
        if len(made) == len(runs) or not _has_integers(batches):
            return found
        halves.append(found)  # an index out of range, which one of them takes, perhaps
        if len(halves) == _MOST_PARTIAL:
            break
    if not halves:
        raise refusal
    return halves[max(0, len(halves) - 2)]  # of 0 and 1: ONNX Runtime reads beyond some tables


def _has_integers(batches: Sequence[Arrays]) -> bool:
    return any(array.dtype.kind in "iu" for batch in batches for array in batch.values())


def _is_contradiction(noise: Difference) -> bool:
    return noise.size > _CONTRADICTION and noise.gap > _ROUNDING


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
