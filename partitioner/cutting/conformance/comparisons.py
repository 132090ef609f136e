"""Refuse a bundle whose results differ from those of the original model.

Three things are compared with the original before training: the prepared model, the parts that the
two parties run, and the model merged from these parts.  A difference is a mistake of splitonnx or
of an optimization in ONNX Runtime, never of the user.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice

import numpy as np
import onnx
import onnx_ir as ir

from splitonnx.bundles import Bundle
from splitonnx.errors import DifferentResult, quote
from splitonnx.losses import FROM_MODEL
from splitonnx.manifests import KEY
from splitonnx.names import PORTABLE
from splitonnx.partitioner.cutting.conformance.dataflow import (
    BrokeDown,
    Level,
    Made,
    NotRun,
    refuse_breakdowns,
    run_merged,
    run_prepared,
    run_session,
    run_split,
)
from splitonnx.partitioner.cutting.conformance.expectations import (
    Expectation,
    check_sizes,
    describe_single,
    expect,
    expect_smaller,
    find_overflow,
)
from splitonnx.partitioner.cutting.conformance.freed_batches import FreedBatch, list_freed
from splitonnx.partitioner.cutting.conformance.measures import (
    TOLERATED,
    Difference,
    find_choices,
    find_largest,
    has_finite,
)
from splitonnx.partitioner.cutting.conformance.originals import (
    copy_original,
    find_first,
    has_packed_weights,
    name_source,
    read_comparable,
    refuse_false_sizes,
    set_inference_modes,
    set_training_modes,
)
from splitonnx.partitioner.cutting.conformance.quantized_ranges import find_upper_ends
from splitonnx.partitioner.cutting.conformance.sample_comparisons import (
    Subject,
    compare_samples,
    describe_unchecked,
)
from splitonnx.partitioner.cutting.conformance.samples import Arrays, iter_draws
from splitonnx.partitioner.cutting.dequantized_originals import compare_dequantized, compare_kernels
from splitonnx.partitioner.cutting.passes.batches import JOINING
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.gate.gates import ModelSource
from splitonnx.partitioner.gate.walks import label_node
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.native.companions import run_together
from splitonnx.session_settings import FUSION

MOST_BYTES = 1 << 30
"""The total size of weights, in bytes, up to which a model can be compared.

The comparison serializes the model four times.
"""
USUAL_BYTES = 1 << 26
"""The total size of weights, in bytes, up to which a model is compared by default.

Comparing a larger model takes several seconds, so the user has to ask for it.
"""
_WORTH_A_PROCESS = 1 << 23
"""The total size of weights, in bytes, from which both forms are compared at the same time."""
_SEEDS = (0, 1, 2)
"""Seeds for random inputs.

A difference counts only if the first seed and another show it, because rounding can change the
result of operators such as ArgMax.
"""
_MOST_SEEDS = 12
"""The number of seeds with which to see whether optimizations change the original's own results."""
_OPTIMIZED: tuple[Level, ...] = ("basic", "all")

_USUAL = "the merged model in a session with ONNX Runtime's usual settings"
_ADVICE = (
    f'set the session\'s config entry {FUSION} to "1" where the model is used '
    "(docs/quantization.md)"
)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """The original model in its form for inference or training, and what is compared with it.

    ``left_out`` names outputs that are left out on purpose.
    """

    original: onnx.ModelProto
    made: Sequence[Made]
    left_out: Collection[str] = ()


@attribute_errors_to_pass("compared with the model given")
def compare_with_original(
    source: ModelSource,
    prepared: PreparedModel,
    bundle: Bundle,
    merge: Callable[[], bytes],
    most_bytes: int = MOST_BYTES,
) -> list[str]:
    """Compare the prepared model, the parts in ``bundle`` and the merged model with the original.

    ``source`` is the original model, and ``merge`` is a function that merges the untrained parts.
    A model whose weights take more than ``most_bytes`` is not compared.

    Return remarks about small differences, about results for which the two evaluators disagree, and
    about everything that could not be compared.

    Raises:
        DifferentResult: a result differs from that of the original by more than a small amount.
        MixedSamples, BatchNotFreed: the user freed a fixed batch, but the model's nodes rely on it.
        NotAModel: the original model can no longer be read.
        NativeCrash: ONNX Runtime ends its process over what was made from the original.
        UnsupportedModel: an output has other sizes than the original model's file declares.
    """
    subject = name_source(source)
    freed = list_freed(source, prepared)
    try:
        inlined = read_comparable(source, prepared, most_bytes)
    except NotRun as error:
        reason = f"{subject} was not compared with its parts: {error}"
        return [reason, *describe_unchecked(freed)]
    changed = [node.op_type for node in prepared.skeleton.graph if node.name in prepared.freed]
    if not JOINING.isdisjoint(changed):
        for batch in freed:  # the original runs with other batches, but joins or drops samples
            inlined = batch.fix(inlined)
    listed = _list_forms(inlined, prepared, bundle, merge(), subject)
    forms = [_refuse_breakdowns(form, subject) for form in listed]
    model = Subject(
        name=subject,
        original=forms[0].original,
        freed=prepared.freed,
        has_loss=any(loss.kind == FROM_MODEL for loss in bundle.manifest.recipe.list_losses()),
    )
    # First the samples: a model that mixes them may give arbitrary results for several.
    mixed = [remark for batch in freed for remark in compare_samples(batch, model, forms[0].made)]
    remarks = compare_dequantized(source, prepared.adjustments, subject)
    if prepared.adjustments.dequantize or has_packed_weights(inlined):
        remarks += compare_kernels(source, prepared.adjustments, subject)
    fixed = [batch for batch in freed if changed and len(batch.counts) == 1]
    if fixed:
        return list(dict.fromkeys([*remarks, *mixed, *map(_describe_untrained, fixed)]))
    sizes = _list_sizes(prepared.skeleton.graph)
    is_doubled = not freed and not prepared.states  # of those, others say which batches they take
    holds = [partial(_hold, form, sizes, subject, is_doubled=is_doubled) for form in forms]
    large = _WORTH_A_PROCESS <= sum(w.nbytes for w in prepared.weights.values()) <= USUAL_BYTES
    found = run_together(holds) if large else [hold() for hold in holds]
    return list(dict.fromkeys([*remarks, *chain(*found), *mixed]))


def _describe_untrained(batch: FreedBatch) -> str:
    """Return a remark on a batch of one size that the model in its file does not take."""
    free = " ".join(f"--dim {name}:{axis}=N" for name, axis in batch.places)
    return (
        f"{batch.options}: since the model's file takes a batch of {batch.rows} only, what the "
        f"parts predict was compared sample by sample, and what they train was not; {free} frees "
        "the batch instead, and compares both"
    )


def _list_forms(
    inlined: onnx.ModelProto, prepared: PreparedModel, bundle: Bundle, joined: bytes, subject: str
) -> list[_Form]:
    """List the forms to compare, without the training form if its results are random.

    The training form is also left out if the original cannot be set to the same modes.
    """

    def run(model: ir.Model, is_traced: bool, batches: Sequence[Arrays]) -> list[Arrays]:
        return run_prepared(model, prepared.weights, batches, subject, is_traced=is_traced)

    inference, merged = copy_original(inlined), onnx.load_from_string(joined)
    set_inference_modes(inference)
    trace = partial(run, prepared.inference, True)
    predict, infer = partial(run_split, bundle), partial(run_merged, bundle, merged)
    parts = Made(
        label="what the parts predict",
        run=partial(predict, subject=subject),
        trace=trace,
        plain=partial(predict, subject=subject, level="none"),
    )
    whole = Made(
        label="the merged model",
        run=partial(infer, subject=subject, level="all"),
        trace=trace,
        plain=partial(infer, subject=subject, level="none"),
    )
    predicting = [parts, whole]
    if find_upper_ends(inlined):
        usual = partial(infer, subject=subject, level="usual")
        predicting.append(Made(label=_USUAL, run=usual, trace=trace, advice=_ADVICE))
    recipe = bundle.manifest.recipe
    predicted = {spec.name for spec in bundle.client.manifest.outputs}
    own = {loss.output or "" for loss in recipe.list_losses() if loss.kind == FROM_MODEL}
    own |= {output for output, _ in recipe.states}
    left_out = own - predicted  # the model's losses and states, which are not predicted
    if recipe.client_target == PORTABLE:  # an export is optimized at this level
        export = partial(predict, subject=subject, level="basic")
        predicting.append(replace(parts, label="what exported parts predict", run=export))
    is_random = any(value.name == KEY for value in prepared.training.graph.inputs)
    if is_random or not set_training_modes(
        inlined, recipe.batchnorm, recipe.dropout, prepared.separations
    ):
        return [_Form(original=inference, made=predicting, left_out=left_out)]
    training = Made(
        label="the model prepared for training",
        run=partial(run, prepared.training, False),
        trace=partial(run, prepared.training, True),
        has_all=False,
    )
    if inlined == inference:  # one evaluation serves both
        return [_Form(original=inference, made=[*predicting, training], left_out=left_out)]
    return [
        _Form(original=inference, made=predicting, left_out=left_out),
        _Form(original=inlined, made=[training]),
    ]


def _refuse_breakdowns(form: _Form, subject: str) -> _Form:
    """Refuse whatever ends its process or cannot be loaded, unless it only leads to advice."""
    made = [
        each if each.advice else replace(each, run=refuse_breakdowns(each.run, each.label, subject))
        for each in form.made
    ]
    return replace(form, made=made)


def _hold(
    form: _Form, sizes: Mapping[str, Sequence[int]], subject: str, *, is_doubled: bool
) -> list[str]:
    """Compare a form of the original with what was made from it, and return remarks.

    If ``is_doubled`` is true, a remark says whether it takes one sample only.
    """
    try:
        expectation = expect(form.original, subject, _SEEDS[0])
    except NotRun as error:
        if isinstance(error, BrokeDown):  # perhaps its parts do so too
            _try_first_draw(form)
        for made in form.made:
            with suppress(NotRun):
                made.run([])  # refuses what no party can load
        return [f"{subject} was not compared with its parts, since it does not run: {error}"]
    check_sizes(expectation, sizes, subject)
    remarks = []
    if void := [name for name, arrays in expectation.list_outputs() if not has_finite(arrays)]:
        remarks.append(
            f"{subject} was not compared with its parts in {quote(void)}, of which no element is "
            "finite for any random input tried"
        )
    for noise in expectation.contradicted[-1:]:  # the largest
        extent = f"by {noise.size:.1e}" if np.isfinite(noise.size) else "in sizes or infinities"
        remarks.append(
            f"onnx's reference evaluator and ONNX Runtime differ {extent} over {subject}, in "
            f"'{noise.tensor}'; its parts were compared with both"
        )
    for noise in expectation.cancelled:
        remarks.append(
            f"rounding leaves little of '{noise.tensor}' in {subject}: onnx's reference evaluator "
            f"and ONNX Runtime differ by {noise.gap:.1e}, {noise.size:.1e} of its largest value"
        )
    if is_doubled:
        run, batches = form.made[0].run, expectation.batches
        remarks += filter(None, [describe_single(form.original, batches, run, subject)])
    for made in form.made:
        try:
            found = made.run(expectation.batches)
        except NotRun as error:
            remarks.append(f"{made.label} does not run on inputs that {subject} takes: {error}")
            continue
        missing = [name for name in expectation.find_missing(found) if name not in form.left_out]
        if made.has_all and missing:
            remarks.append(f"{made.label} leaves out {quote(missing)}, an output of {subject}")
        if (remark := _hold_made(made, found, expectation, subject)) is not None:
            remarks.append(remark)
    return remarks


def _try_first_draw(form: _Form) -> None:
    """Run what was made from the original on random inputs, to see whether it breaks down."""
    for batches in islice(iter_draws(form.original, _SEEDS[0]), 1):
        for made in form.made:
            with suppress(NotRun):
                made.run(batches)


def _list_sizes(graph: ir.Graph) -> dict[str, list[int]]:
    """Map each output of known rank to its sizes, with 0 for those that are not known."""
    return {
        value.name or "": [dim if isinstance(dim, int) else 0 for dim in value.shape]
        for value in graph.outputs
        if value.shape is not None
    }


def _hold_made(
    made: Made, found: Sequence[Arrays], expectation: Expectation, subject: str
) -> str | None:
    difference = expectation.find_difference(found)
    if not difference.size:
        return None
    overflow = "" if np.isfinite(difference.size) else find_overflow(expectation, subject)
    smaller = expect_smaller(expectation, subject, _SEEDS[0]) if overflow else None
    if smaller is not None:
        expectation, found = smaller, made.run(smaller.batches)
        difference = expectation.find_difference(found)
        if not difference.size:
            return (
                f"{made.label} agrees with {subject} for small inputs, but for larger ones, where "
                f"'{overflow}' overflows, one of them is finite and the other is not"
            )
    try:
        size = min(difference.size, _confirm(made, expectation.model, subject))
    except NotRun as error:
        return f"{made.label} does not run on inputs that {subject} takes: {error}"
    if not size:
        return None
    if made.advice:
        return (
            f"{made.label} differs by {size:.1e} from {subject}, in '{difference.tensor}'; "
            f"{made.advice}"
        )
    if size <= TOLERATED:
        return f"{made.label} differs by {size:.1e} from {subject}, in '{difference.tensor}'"
    if remark := _describe_choices(made, found, expectation, size, subject):
        return remark
    refuse_false_sizes(expectation, subject)
    first = find_first(expectation, made.trace, difference.tensor, subject)
    raise DifferentResult(subject, made.label, difference.tensor, first, size)


def _describe_choices(
    made: Made, found: Sequence[Arrays], expectation: Expectation, size: float, subject: str
) -> str:
    """Return a remark if rounding explains what differs in ``found``, since it decides choices.

    This is so if only outputs behind such choices differ, if what was made agrees with the original
    where ONNX Runtime optimizes neither, and if optimizing the original changes its own results,
    too.  An example is a MaxPool that returns the places of almost equal numbers.  Return an empty
    string otherwise.
    """
    model = expectation.model
    choices = find_choices(model)
    others = [{n: a for n, a in batch.items() if n not in choices} for batch in found]
    if not choices or made.plain is None or expectation.find_difference(others).size:
        return ""
    own = Difference(tensor="", batch=0, size=0.0)
    try:
        for seed in range(_MOST_SEEDS):
            if own.size > TOLERATED and seed not in _SEEDS:
                break
            drawn = expect(model, subject, seed) if seed else expectation
            if drawn.find_difference(made.plain(drawn.batches)).size:
                return ""
            for level in _OPTIMIZED:
                optimized = run_session(model, drawn.batches, subject, level=level)
                chosen = [{n: a for n, a in b.items() if n in choices} for b in optimized]
                own = find_largest([own, drawn.find_difference(chosen)])
    except NotRun:
        return ""
    if own.size <= TOLERATED:
        return ""
    return (
        f"rounding decides '{own.tensor}' in {subject}, by {label_node(choices[own.tensor])}: "
        f"{made.label} differs by {size:.1e} where ONNX Runtime optimizes it, {subject} itself by "
        f"{own.size:.1e}, and both agree without optimizations"
    )


def _confirm(made: Made, model: onnx.ModelProto, subject: str) -> float:
    """Return the largest difference that the other seeds show."""
    others = [expect(model, subject, seed) for seed in _SEEDS[1:]]
    return max(other.find_difference(made.run(other.batches)).size for other in others)
