"""Refuse a bundle that does not compute what the model given computes.

The prepared model, the parts run split and the merged model are compared with the model given
before anything is trained.  A difference is a mistake of splitonnx or of an optimization of ONNX
Runtime, never of the user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx
import onnx_ir as ir

from splitonnx.bundles import Bundle
from splitonnx.errors import DifferentResult
from splitonnx.errors.roots import quote
from splitonnx.manifests import KEY
from splitonnx.names import PORTABLE
from splitonnx.partitioner.cutting.conformance.dataflow import (
    NotRun,
    expose,
    inline_weights,
    run_session,
    run_split,
)
from splitonnx.partitioner.cutting.conformance.expectations import Expectation, expect
from splitonnx.partitioner.cutting.conformance.measures import Difference, measure
from splitonnx.partitioner.cutting.conformance.originals import (
    copy_original,
    find_random,
    set_inference_modes,
    set_training_modes,
)
from splitonnx.partitioner.cutting.conformance.samples import Arrays
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.gate.gates import ModelSource, read_original
from splitonnx.partitioner.graphs.transcripts import write_model
from splitonnx.partitioner.normalization.weights import read_array

TOLERATED = 1e-3
"""Relative difference up to which a model is cut with a remark; a larger one is refused."""
MOST_BYTES = 1 << 30
"""The largest weights in bytes with which a model can be compared; it is serialized four times."""
USUAL_BYTES = 1 << 28
"""The same, unless the user asks for the comparison: it takes some seconds then."""
_SEEDS = (0, 1)
"""Seeds of the draws.  A difference must show for both, since a value on the edge of two results,
as of ArgMax, may fall on either side."""


_Run = Callable[[Sequence[Arrays]], list[Arrays]]


@dataclass(frozen=True, kw_only=True)
class _Made:
    """Something that was made of the model given.

    ``run`` runs it and returns its outputs, and ``trace`` runs the prepared model that it was made
    of and returns all of its tensors.  ``has_all`` says that it should have every output.
    """

    label: str
    run: _Run
    trace: _Run
    has_all: bool = True


@dataclass(frozen=True, kw_only=True)
class _Form:
    """The model given, in the form for inference or training, and what is held against it."""

    original: onnx.ModelProto
    made: Sequence[_Made]


def compare_with_original(
    source: ModelSource,
    prepared: PreparedModel,
    bundle: Bundle,
    merge: Callable[[], bytes],
    most_bytes: int = MOST_BYTES,
) -> list[str]:
    """Compare the prepared model, the parts and the merged model with the model given.

    ``source`` is the model given, and ``merge`` returns the merged model before any training.  A
    model whose weights take more than ``most_bytes`` is not compared.

    Return remarks: what could not be compared, and differences that are small.

    Raises:
        DifferentResult: a result differs, so what was cut is not the model given.
        NotAModel: the model given cannot be read any more.
    """
    subject = str(source) if isinstance(source, str | Path) else "the model"
    if (size := sum(tensor.nbytes for tensor in prepared.weights.values())) > most_bytes:
        return [
            f"{subject} was not compared with its parts, because its weights take "
            f"{size / 1e6:,.0f} MB"
        ]
    inlined = copy_original(read_original(source, prepared.adjustments))
    if (node := find_random(inlined)) is not None:
        return [f"{subject} was not compared with its parts: node '{node}' draws random numbers"]
    remarks = [
        remark
        for form in _list_forms(inlined, prepared, bundle, merge(), subject)
        for remark in _hold(form, subject)
    ]
    return list(dict.fromkeys(remarks))


def _list_forms(
    inlined: onnx.ModelProto, prepared: PreparedModel, bundle: Bundle, merged: bytes, subject: str
) -> list[_Form]:
    """List the forms to compare; the training form is left out if a Dropout is on in training."""

    def run(model: ir.Model, is_traced: bool, batches: Sequence[Arrays]) -> list[Arrays]:
        weights = {name: read_array(tensor) for name, tensor in prepared.weights.items()}
        written = expose(write_model(model)) if is_traced else write_model(model)
        content = inline_weights(written, weights)
        return run_session(content, batches, subject, level="none")

    inference = copy_original(inlined)
    set_inference_modes(inference)
    trace = partial(run, prepared.inference, True)
    predict, infer = partial(run_split, bundle), partial(run_session, merged, level="all")
    predicting = [
        _Made(label="what the parts predict", run=partial(predict, subject=subject), trace=trace),
        _Made(label="the merged model", run=partial(infer, subject=subject), trace=trace),
    ]
    recipe = bundle.manifest.recipe
    if recipe.client_target == PORTABLE:  # an export is optimized at this level
        export = partial(predict, subject=subject, level="basic")
        predicting.append(_Made(label="what exported parts predict", run=export, trace=trace))
    is_random = any(value.name == KEY for value in prepared.training.graph.inputs)
    if is_random or not set_training_modes(inlined, recipe.batchnorm, recipe.dropout):
        return [_Form(original=inference, made=predicting)]
    training = _Made(
        label="the model prepared for training",
        run=partial(run, prepared.training, False),
        trace=partial(run, prepared.training, True),
        has_all=False,
    )
    if inlined == inference:  # one evaluation serves both
        return [_Form(original=inference, made=[*predicting, training])]
    return [
        _Form(original=inference, made=predicting),
        _Form(original=inlined, made=[training]),
    ]


def _hold(form: _Form, subject: str) -> list[str]:
    """Hold what was made of a model against one of its forms, and return remarks."""
    try:
        expectation = expect(form.original, subject, _SEEDS[0])
    except NotRun as error:
        return [f"{subject} was not compared with its parts, since it does not run: {error}"]
    remarks = []
    for noise in expectation.contradicted[-1:]:  # the largest
        remarks.append(
            f"onnx's reference evaluator and ONNX Runtime differ by {noise.size:.1e} over "
            f"{subject}, in '{noise.tensor}'; its parts were compared with both"
        )
    for noise in expectation.cancelled:
        remarks.append(
            f"rounding leaves little of '{noise.tensor}' in {subject}: onnx's reference evaluator "
            f"and ONNX Runtime differ by {noise.gap:.1e}, {noise.size:.1e} of its largest value"
        )
    for made in form.made:
        try:
            found = made.run(expectation.batches)
        except NotRun as error:
            remarks.append(f"{made.label} does not run on inputs that {subject} takes: {error}")
            continue
        if made.has_all and (missing := expectation.find_missing(found)):
            remarks.append(f"{made.label} leaves out {quote(missing)}, an output of {subject}")
        if (remark := _hold_made(made, found, expectation, subject)) is not None:
            remarks.append(remark)
    return remarks


def _hold_made(
    made: _Made, found: Sequence[Arrays], expectation: Expectation, subject: str
) -> str | None:
    difference = expectation.find_difference(found)
    if not difference.size:
        return None
    try:
        again = expect(expectation.model, subject, _SEEDS[1])
        confirmed = again.find_difference(made.run(again.batches))
    except NotRun as error:
        return f"{made.label} does not run on inputs that {subject} takes: {error}"
    size = min(difference.size, confirmed.size)
    if not size:
        return None
    if size <= TOLERATED:
        return f"{made.label} differs by {size:.1e} from {subject}, in '{difference.tensor}'"
    raise DifferentResult(
        subject,
        made.label,
        difference.tensor,
        _find_first(made, expectation, difference, subject),
        size,
    )


def _find_first(made: _Made, expectation: Expectation, difference: Difference, subject: str) -> str:
    """Return the first tensor of the model given that the prepared model computes otherwise.

    If the uncut prepared model computes all the same, this is the output itself.
    """
    traced = expose(copy_original(expectation.model)).SerializeToString()
    try:
        found = made.trace(expectation.batches)
        expected = run_session(traced, expectation.batches, subject, level="none")
    except NotRun:
        return difference.tensor
    for node in expectation.model.graph.node:
        for name in map(str, node.output):
            for want, have in zip(expected, found, strict=True):
                if name in want and name in have and measure(have[name], want[name]) > TOLERATED:
                    return name
    return difference.tensor
