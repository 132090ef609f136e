"""Compute the results expected of the original model for random inputs.

Two independent evaluators compute them: onnx's reference evaluator and ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import onnx

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.cutting.conformance.dataflow import (
    BrokeDown,
    CorrectionFailed,
    EvaluatorFailed,
    NotRun,
    Run,
    describe_failure,
    expose,
    has_poolings,
    run_original,
    run_reference,
    run_session,
)
from splitonnx.partitioner.cutting.conformance.measures import (
    Difference,
    find_largest,
    is_coarse,
    is_finite,
    list_differences,
)
from splitonnx.partitioner.cutting.conformance.samples import (
    Arrays,
    find_masks,
    find_open_batch,
    has_integers,
    iter_draws,
    repeat_sample,
)
from splitonnx.partitioner.graphs.faults import report_mistake
from splitonnx.partitioner.native.stored_tensors import separate_weights

EXACT = 1e-5
"""Relative differences up to this size are ignored, and larger ones if rounding explains them."""
COARSE = 2e-2
"""As :data:`EXACT`, for models that compute with 16-bit floats or with quantized numbers."""
_NOISE_FACTOR = 20
"""The allowed difference, as a multiple of the difference between the two evaluators."""
_CONTRADICTION = 1e-2
"""The relative difference above which the two evaluators contradict each other."""
_ROUNDING = 1e-6
"""The absolute difference that rounding explains, as in sums that cancel out."""
_SCALES = (10.0, 0.1, 100.0)
"""Standard deviations of inputs to try after 1, if each output has equal rows only."""
_SMALLER = (0.1, 0.01, 0.001)
"""Standard deviations of inputs to try after 1, if some output is not finite."""
_MOST_PARTIAL = 6
"""The search for inputs ends after this many draws that only one evaluator accepts."""
Draw = Callable[[onnx.ModelProto, int, float], Iterator[list[Arrays]]]
"""A function like ``iter_draws``, which draws random batches for a model."""
_MOST_REFERENCE = 64 << 20
"""The size in bytes of the largest model that the reference evaluator, which is slow, runs."""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """The results of a model for some batches, according to one or both evaluators.

    ``reference`` holds the results of onnx's reference evaluator for each batch, and ``session``
    those of an ONNX Runtime session without optimizations.  ``None`` means that the evaluator
    did not run the model.
    """

    model: onnx.ModelProto
    batches: Sequence[Arrays]
    reference: Sequence[Arrays] | None
    session: Sequence[Arrays] | None

    @property
    def is_telling(self) -> bool:
        """Return whether a comparison of the outputs can reveal mistakes.

        Outputs that are equal for all inputs would hide many mistakes.  Therefore, some output must
        have rows that differ, unless no output has several rows.
        """
        several = [arrays for _, arrays in self.list_outputs() if sum(map(_count_rows, arrays)) > 1]
        return not several or any(map(_is_varied, several))

    def list_outputs(self) -> list[tuple[str, list[np.ndarray]]]:
        """List each output's name with its results for all batches."""
        found = self.session or self.reference or ()
        return [(name, [batch[name] for batch in found]) for name in next(iter(found), ())]

    @property
    def is_finite(self) -> bool:
        """Return whether each output is finite, so that a comparison reveals every mistake."""
        outcomes = [*(self.session or ()), *(self.reference or ())]
        return all(is_finite(array) for batch in outcomes for array in batch.values())

    @cached_property
    def noise(self) -> Mapping[tuple[str, int], Difference]:
        """Map each tensor and batch to the difference between the two evaluators' results.

        The map is empty if only one evaluator ran.
        """
        if self.reference is None or self.session is None:
            return {}
        every = list_differences(self.reference, self.session)
        return {(each.tensor, each.batch): each for each in every}

    @property
    def contradicted(self) -> list[Difference]:
        """List the differences between the evaluators that rounding cannot explain, largest last.

        Each tensor is listed once.  One of the evaluators must be wrong about it.
        """
        found = [each for each in self._list_noise() if _is_contradiction(each)]
        return sorted(found, key=lambda each: each.size)

    @property
    def cancelled(self) -> list[Difference]:
        """List the differences of tensors that are mostly rounding errors, one for each tensor.

        An example is a sum that should be zero.
        """
        return [
            each
            for each in self._list_noise()
            if each.size > _CONTRADICTION and not _is_contradiction(each)
        ]

    def _list_noise(self) -> Iterable[Difference]:
        """List for each tensor the largest difference between the two evaluators."""
        ordered = sorted(self.noise.values(), key=lambda each: each.size)
        return {each.tensor: each for each in ordered}.values()

    @cached_property
    def least(self) -> float:
        """Return the relative difference that is allowed for every tensor.

        It is larger for models that compute with 16-bit floats or with quantized numbers.
        """
        return COARSE if is_coarse(self.model) else EXACT

    def allow(self, tensor: str, batch: int) -> float:
        """Return the relative difference that is allowed for a tensor in the batch with this index.

        This is :attr:`least`, or a multiple of the difference between the two evaluators' results
        if that is larger and rounding can explain it.
        """
        noise = self.noise.get((tensor, batch))
        if noise is None or _is_contradiction(noise):
            return self.least
        return max(self.least, _NOISE_FACTOR * noise.size)

    def find_missing(self, found: Sequence[Arrays]) -> list[str]:
        """List the names of the model's outputs that are missing in ``found``."""
        outcome = self.reference or self.session or ()
        lists = zip(outcome, found, strict=True)
        return list(dict.fromkeys(n for want, have in lists for n in want if n not in have))

    def find_difference(self, found: Sequence[Arrays]) -> Difference:
        """Return the largest difference between ``found`` and the expected results.

        Allowed differences are ignored; the returned size is 0 if there are no others.  If both
        evaluators ran, only the one closer to ``found`` counts.
        """
        outcomes = [made for made in (self.reference, self.session) if made is not None]
        differences = [
            find_largest(
                [
                    each
                    for each in list_differences(outcome, found)
                    if each.size > self.allow(each.tensor, each.batch)
                ]
            )
            for outcome in outcomes
        ]
        return min(differences, key=lambda difference: difference.size)


def expect(model: onnx.ModelProto, subject: str, seed: int, draw: Draw = iter_draws) -> Expectation:
    """Draw random inputs that a model accepts, and evaluate the model with them.

    If no output depends on the inputs, as after a Relu of only negative numbers, larger and smaller
    inputs are tried, and smaller ones if an output is not finite, as where numbers overflow.
    ``subject`` names the model in error messages.  ``draw`` is the function that draws the inputs.

    Raises:
        NotRun: neither evaluator accepts any of the random inputs; this is a :class:`BrokeDown` if
            one of them ended its process.
        InternalModelError: an operator of :mod:`native.corrections` fails on inputs that ONNX
            Runtime accepts.
    """
    first = _expect(model, subject, seed, 1.0, draw)
    if first.is_telling and first.is_finite:
        return first
    usable = [first] if first.is_telling else []
    for scale in (() if first.is_telling else _SCALES) + (() if first.is_finite else _SMALLER):
        with suppress(NotRun):
            other = _expect(model, subject, seed, scale, draw)
            if other.is_telling and other.is_finite:
                return other
            usable += [other] if other.is_telling else []
    return next(iter(usable), first)


def find_overflow(expectation: Expectation, subject: str) -> str:
    """Return the name of the original's first tensor that is not finite, or an empty string."""
    found: list[Arrays] = []
    traced = onnx.ModelProto()
    traced.CopyFrom(expectation.model)
    expose(traced)
    with suppress(NotRun):
        found = run_session(traced, expectation.batches, subject, level="none")
    made = [name for node in traced.graph.node for name in node.output]
    return next((n for n in made if not all(is_finite(b[n]) for b in found if n in b)), "")


def expect_smaller(expectation: Expectation, subject: str, seed: int) -> Expectation | None:
    """Return the results for inputs so small that nothing overflows, or ``None``."""
    for scale in _SMALLER:
        with suppress(NotRun):
            other = _expect(expectation.model, subject, seed, scale, iter_draws)
            if other.is_telling and not find_overflow(other, subject):
                return other
    return None


def _expect(
    model: onnx.ModelProto, subject: str, seed: int, scale: float, draw: Draw
) -> Expectation:
    light = separate_weights(model)
    runs: dict[str, Callable[[Sequence[Arrays]], list[Arrays]]] = {
        "session": partial(run_original, light, subject=subject, is_pooled=has_poolings(model))
    }
    if light.size <= _MOST_REFERENCE:
        runs["reference"] = partial(run_reference, light, subject=subject)
    refusal = NotRun("no input could be drawn for its inputs' types")
    has_masks = bool(find_masks(model))
    has_indices = has_masks or has_integers(model)
    halves: list[Expectation] = []
    for batches in draw(model, seed, scale):
        made: dict[str, list[Arrays]] = {}
        failed: CorrectionFailed | None = None
        for name, run in runs.items():
            try:
                made[name] = run(batches)
            except NotRun as error:
                if not isinstance(refusal, BrokeDown) and not isinstance(error, EvaluatorFailed):
                    refusal = error
                failed = error if isinstance(error, CorrectionFailed) else failed
        if failed is not None and "session" in made:
            raise report_mistake(subject, "evaluated with operators of our own", failed)
        if not made:
            continue
        found = Expectation(
            model=model,
            batches=batches,
            reference=made.get("reference"),
            session=made.get("session"),
        )
        if len(made) == len(runs) or ("session" in made and not has_indices):
            return found
        halves.append(found)  # an index or a length out of range, which one of them takes, perhaps
        if len(halves) == _MOST_PARTIAL * (1 + has_masks):  # each limit is drawn twice then
            break
    if not halves:
        raise refusal
    # Of 0 and 1, if there are indices: ONNX Runtime reads beyond some tables.
    return halves[max(0, len(halves) - 2) if has_indices else 0]


def describe_single(
    model: onnx.ModelProto, batches: Sequence[Arrays], run: Run, subject: str
) -> str:
    """Return a sentence if a model takes one sample only, though it leaves its batch size open.

    ``batches`` are inputs that the model takes, and ``run`` runs what is tried with two samples.
    Return an empty string if it takes them, if it took several already, or if it does not even take
    one of them, so that something else than their number is wrong.
    """
    symbol = find_open_batch(model)
    repeated = [repeat_sample(model, batch, symbol) for batch in batches] if symbol else []
    tried = [batch for batch in repeated if batch is not None]
    if not tried or len(tried) < len(batches):
        return ""
    try:
        run(batches)
    except NotRun:
        return ""
    try:
        run(tried)
    except NotRun as error:
        return (
            f"{subject} takes a batch of 1 only, though its inputs leave it open as '{symbol}': "
            f"with 2 samples, {describe_failure(error)}; export it again with a dynamic batch, or "
            f"train with one sample in each batch, with --dim {symbol}=1"
        )
    return ""


def check_sizes(expectation: Expectation, sizes: Mapping[str, Sequence[int]], subject: str) -> None:
    """Check that the outputs of a model have the sizes that are known of them.

    Where no operator tells a size, it is what the file declares.  The loss relies on it, so a wrong
    one would make training fail at the first step, or give a wrong loss.

    Raises:
        UnsupportedModel: an output has another size.
    """
    outcome = expectation.reference or expectation.session or ()
    evaluator = "onnx's reference evaluator" if expectation.reference else "ONNX Runtime"
    for name, dims in sizes.items():
        for shape in [batch[name].shape for batch in outcome if name in batch]:
            if len(dims) == len(shape) and _contradict(dims, shape):
                declared = _read_declared(expectation.model, name)
                if len(declared) == len(shape) and _contradict(declared, shape):
                    raise describe_false_size(f"output '{name}' of {subject}", dims, shape)
                raise UnsupportedModel(
                    f"output '{name}' of {subject}",
                    f"by the ONNX standard it has the sizes {[dim or '?' for dim in dims]}, but it "
                    f"has {list(shape)} when {evaluator} runs it",
                    "export it again with other operators or with explicit sizes and padding",
                )


def _read_declared(model: onnx.ModelProto, output: str) -> list[int]:
    """Return the sizes that a model declares for an output, with 0 for those that are not known."""
    return [
        dim.dim_value
        for value in model.graph.output
        if value.name == output
        for dim in value.type.tensor_type.shape.dim
    ]


def _contradict(declared: Sequence[int], shape: Sequence[int]) -> bool:
    """Return whether a size after the batch differs from the declared one; 0 matches any size."""
    pairs = list(zip(declared, shape, strict=True))[1:]
    return any(own and own != size for own, size in pairs)


def describe_false_size(
    what: str, declared: Sequence[int], sizes: Sequence[int]
) -> UnsupportedModel:
    """Return the error for a tensor whose file declares sizes (0 if open) that it does not have."""
    told = [dim or "?" for dim in declared]
    return UnsupportedModel(
        what,
        f"its file declares the sizes {told}, but it has {list(sizes)} when it runs",
        "export it again, or delete the declared sizes",
    )


def draw_accepted(model: onnx.ModelProto, subject: str, seed: int) -> Sequence[Arrays]:
    """Return random inputs that ONNX Runtime accepts, or nothing if none are found."""
    for batches in iter_draws(model, seed):
        with suppress(NotRun):
            run_session(model, batches, subject, level="none")
            return batches
    return ()


def _count_rows(array: np.ndarray) -> int:
    return len(array) if array.ndim else 1


def _is_varied(arrays: Sequence[np.ndarray]) -> bool:
    """Return whether rows of one or several arrays differ."""
    filled = [np.atleast_1d(array) for array in arrays if array.size]
    return any(
        array.shape[1:] != filled[0].shape[1:] or bool((array != filled[0][:1]).any())
        for array in filled
    )


def _is_contradiction(noise: Difference) -> bool:
    return noise.size > _CONTRADICTION and noise.gap > _ROUNDING
