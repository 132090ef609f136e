"""Cut a model into a bundle.

The model is prepared, extended by the loss, differentiated and split between the two parties, and
the parts are compared with the original model.  This module only runs these steps in order; each
step is implemented in another module.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import onnx_ir as ir

from splitonnx.bundles import Bundle
from splitonnx.errors import NotACut, UsageError, quote
from splitonnx.losses import (
    CROSS_ENTROPY,
    LABELS,
    Loss,
    LossSource,
    complete_losses,
    is_plain,
)
from splitonnx.names import TARGETS, TRAINING, BatchNormModes, DropoutMode, Target
from splitonnx.optimizers import AdamW, Optimizer, assign_groups, describe_optimizer
from splitonnx.partitioner.advice import add_advice
from splitonnx.partitioner.cutting.assemblies import assemble
from splitonnx.partitioner.cutting.carried_states.declarations import Pairs, list_pairs
from splitonnx.partitioner.cutting.carried_states.placements import (
    check_readers,
    leave_out_states,
)
from splitonnx.partitioner.cutting.carried_states.suggestions import describe_overlooked_states
from splitonnx.partitioner.cutting.conformance.comparisons import (
    MOST_BYTES,
    USUAL_BYTES,
    compare_with_original,
)
from splitonnx.partitioner.cutting.conformance.freed_batches import list_freed
from splitonnx.partitioner.cutting.conformance.sample_comparisons import describe_unchecked
from splitonnx.partitioner.cutting.conformance.score_ranges import describe_probabilities
from splitonnx.partitioner.cutting.joints import (
    NOTHING_TO_TRAIN,
    JointGraph,
    build_predict,
    build_training,
)
from splitonnx.partitioner.cutting.passes.batch_decisions import describe_decided
from splitonnx.partitioner.cutting.passes.batches import describe_freed
from splitonnx.partitioner.cutting.passes.given_names import naming_as_given
from splitonnx.partitioner.cutting.passes.joined_statistics import describe_separations
from splitonnx.partitioner.cutting.passes.stored_options import describe_stored
from splitonnx.partitioner.cutting.passes.ties import describe_symmetric
from splitonnx.partitioner.cutting.preparations import (
    PreparedModel,
    choose_output,
    describe_adapters,
    list_trained,
    prepare,
)
from splitonnx.partitioner.differentiation.activations.final_activations import CONTAINED
from splitonnx.partitioner.differentiation.activations.squashings import find_repeated_activation
from splitonnx.partitioner.differentiation.control_flow.obstacles import list_undifferentiable
from splitonnx.partitioner.differentiation.loss_arrays import (
    LossGraphs,
    describe_scores,
    find_class_axis,
    list_reads,
)
from splitonnx.partitioner.gate.adjustments import Adjustments, Binding
from splitonnx.partitioner.gate.exporters import OmissionKind, advise, list_omissions
from splitonnx.partitioner.gate.gates import ModelSource, open_model
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.pauses import pause_collection
from splitonnx.partitioner.graphs.traversals import find_movers, map_values
from splitonnx.partitioner.loss_files import read_loss_files
from splitonnx.partitioner.lowerings.centred_normalizations import describe_narrow
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.model_losses import list_predicted, separate_losses
from splitonnx.partitioner.native.requests import keeping_contents
from splitonnx.partitioner.normalization.constants.kept import describe_kept, describe_numbers
from splitonnx.partitioner.normalization.dequantized import untrained
from splitonnx.partitioner.normalization.dequantized.stored import (
    describe_stored_integers,
    find_stored_integers,
)
from splitonnx.partitioner.normalization.weights import make_pattern
from splitonnx.recipes import Recipe

NO_CHECK = "SPLITONNX_NO_CHECK"
"""The environment variable that turns off the default comparison in ``cut`` if it is set to 1."""


class Approval(Protocol):
    """Checks that can refuse a cut by raising an exception."""

    def check_forward(self, prepared: PreparedModel, training: JointGraph) -> None:
        """Check the training graph before it is differentiated.

        A cut that fails this check is refused before the slow step.
        """

    def check(self, prepared: PreparedModel, training: JointGraph, predict: JointGraph) -> None:
        """Check the finished graphs of the cut model, for training and for prediction."""


_log = logging.getLogger(__name__)


@pause_collection()
def cut(
    model: ModelSource | ir.Model,
    *,
    at: str | Sequence[str] | None,
    tail_at: str | Sequence[str] = (),
    loss: LossSource = CROSS_ENTROPY,
    output: str | None = None,
    optimizer: Optimizer | None = None,
    batchnorm: BatchNormModes = None,
    dropout: DropoutMode | None = None,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
    dims: Mapping[str, int | str] | None = None,
    bind: Mapping[str, Binding] | None = None,
    ties: Sequence[tuple[str, str]] = (),
    stop_gradients: str | Sequence[str] = (),
    states: Pairs = (),
    dequantize: bool = False,
    class_axis: int | None = None,
    labels: str = LABELS,
    client_target: Target = TRAINING,
    server_target: Target = TRAINING,
    check: bool | None = None,
    approve: Approval | None = None,
) -> Bundle:
    """Cut a model into a client part and a server part, ready for training.

    Users call :func:`splitonnx.cut` (in :mod:`permissions`), which refuses to send raw inputs or
    labels without permission, and which documents the arguments.  This function does not check for
    permission; ``approve`` can refuse the cut, before and after the model is differentiated.

    Returns:
        The bundle, in memory; ``bundle.save(folder)`` writes it to disk.

    Raises:
        ModelError: the model cannot be read, prepared or differentiated.
        CutError: the tensors do not exist or do not divide the model.
        UsageError: arguments contradict each other.
        ForbiddenOperator: an internal error; the bundle would not run.
        DifferentResult: an internal error; the parts compute other results than the model.
    """
    for target in (client_target, server_target):
        if target not in TARGETS:
            raise UsageError(f"there is no target '{target}'; choose portable or training")
    adjustments = Adjustments(dims=dims or {}, bindings=bind or {}, dequantize=dequantize)
    if isinstance(model, ir.Model) and (adjustments or check):
        raise UsageError(
            "dims, bind, dequantize and check are for a model as it was given, not for an ir.Model"
        )
    opened = model if isinstance(model, ir.Model) else open_model(model, adjustments)
    omissions = [] if isinstance(model, ir.Model) else list_omissions(opened)
    if batchnorm:  # the user decided
        omissions = [one for one in omissions if one.kind is not OmissionKind.FROZEN_BATCHNORM]
    if omissions:
        _log.warning("%s", advise(opened, omissions))
    if (stored := find_stored_integers(opened.graph)) and not dequantize:
        _log.warning("%s", describe_stored_integers(stored))
    if staying := untrained.find_untrained_integers(opened.graph):
        _log.warning("%s", untrained.describe_untrained_integers(staying))
    prepared = prepare(
        opened,
        batchnorm=batchnorm,
        dropout=dropout,
        train=train,
        freeze=freeze,
        adjustments=adjustments,
        ties=ties,
        stop_gradients=_list_names(stop_gradients),
        states=list_pairs(states),
    )
    for note in describe_stored(prepared.stored, prepared.ignored):
        _log.warning("%s", note)
    bundle = cut_prepared(
        prepared,
        at=at,
        tail_at=tail_at,
        loss=loss,
        output=output,
        optimizer=optimizer,
        class_axis=class_axis,
        labels=labels,
        client_target=client_target,
        server_target=server_target,
        approve=approve,
    )
    if not isinstance(model, ir.Model):
        for remark in _compare(model, prepared, bundle, check):
            _log.warning("%s", remark)
    return bundle


@keeping_contents()
@attribute_errors_to_pass("compared with the model given")
def _compare(
    source: ModelSource, prepared: PreparedModel, bundle: Bundle, check: bool | None
) -> list[str]:
    """Compare a bundle with the original model, if this is wanted, and return remarks."""
    if check is False or (check is None and os.environ.get(NO_CHECK) == "1"):
        return describe_unchecked(list_freed(source, prepared))
    most_bytes = USUAL_BYTES if check is None else MOST_BYTES
    remarks = compare_with_original(source, prepared, bundle, partial(merge, bundle), most_bytes)
    return [*remarks, *_list_probabilities(prepared, bundle.manifest.recipe, most_bytes)]


def _list_probabilities(prepared: PreparedModel, recipe: Recipe, most_bytes: int) -> Iterator[str]:
    """Yield a remark for each loss of scores that gets what looks like probabilities."""
    for loss in (loss for loss in recipe.list_losses() if loss.kind in CONTAINED):
        axis = find_class_axis(prepared.training.graph, loss)
        output = loss.output or ""
        likeness = describe_probabilities(prepared, loss.kind, output, axis, most_bytes)
        if likeness:
            yield (
                f"{loss.kind} applies a {CONTAINED[loss.kind]} to '{output}', which looks like "
                f"probabilities: {likeness}; export the model without its last activation, or see "
                "splitonnx check"
            )


@pause_collection()
def cut_prepared(
    prepared: PreparedModel,
    *,
    at: str | Sequence[str] | None,
    tail_at: str | Sequence[str] = (),
    loss: LossSource = CROSS_ENTROPY,
    output: str | None = None,
    optimizer: Optimizer | None = None,
    class_axis: int | None = None,
    labels: str = LABELS,
    client_target: Target = TRAINING,
    server_target: Target = TRAINING,
    approve: Approval | None = None,
) -> Bundle:
    """Cut a prepared model as :func:`cut` does, but do not compare the result with the original.

    The prepared model is not changed, so it can be cut several times.
    """
    optimizer = optimizer or AdamW(lr=1e-3)
    names_at, names_tail = _list_names(at), _list_names(tail_at)
    losses = complete_losses(loss, choose_output(prepared, output), class_axis, labels)
    losses, graphs = read_loss_files(prepared, losses, output)
    first = losses[0]
    outputs = [name for one in losses for name in list_reads(one, graphs)]
    outputs = [choose_output(prepared, name) for name in dict.fromkeys(outputs)]
    prepared = leave_out_states(prepared, outputs)
    recipe = Recipe(
        at=names_at,
        tail_at=names_tail,
        loss=first.kind,
        output=first.output or "",
        optimizer=describe_optimizer(optimizer),
        batchnorm=prepared.batchnorm,
        dropout=prepared.dropout,
        train=prepared.train,
        freeze=prepared.freeze,
        dims=dict(prepared.adjustments.dims),
        bound=_list_bound(prepared.adjustments),
        ties=prepared.ties,
        stop_gradients=prepared.stop_gradients,
        states=prepared.states,
        dequantize=prepared.adjustments.dequantize,
        class_axis=first.class_axis,
        labels=first.array,
        losses=() if is_plain(losses) else losses,
        client_target=client_target,
        server_target=server_target,
    )
    _warn(prepared, losses, graphs)
    examine = None if approve is None else partial(approve.check_forward, prepared)
    with naming_as_given(prepared.given):
        for name in outputs:
            refuse_untrainable(prepared, name)
        assign_groups(optimizer.groups, list_trained(prepared, outputs))  # before the slow step
        try:
            training = build_training(prepared, names_at, names_tail, losses, examine, graphs)
            predicted, own = separate_losses(prepared, losses, [*names_at, *names_tail])
            ends = [list_predicted(predicted, names, prepared) for names in (names_at, names_tail)]
            predict = build_predict(predicted, ends[0], ends[1], losses)
            check_readers(prepared, names_at, training.owners, predict.owners)
        except NotACut as error:
            raise add_advice(error, prepared, names_at, names_tail, outputs) from error
        if approve is not None:
            approve.check(prepared, training, predict)
        return assemble(predicted, training, predict, recipe, optimizer, losses, {**graphs, **own})


@attribute_errors_to_pass("searched for what to warn of")
def _warn(prepared: PreparedModel, losses: Sequence[Loss], graphs: LossGraphs) -> None:
    """Log warnings about what the user may not expect of this cut."""
    _say_kept_scalings(prepared)
    if numbers := prepared.kept_numbers:
        _log.warning("%s, with --train '%s'", describe_numbers(numbers), make_pattern(numbers))
    for told, names in describe_kept(prepared.kept_constants):
        option = make_pattern(names)
        _log.warning("%s, with --train '%s'; --freeze '%s' silences this", told, option, option)
    for loss in losses:
        axis = find_class_axis(prepared.training.graph, loss, graphs)
        if axis != 1 and loss.class_axis is None:
            _say_class_axis(prepared, loss.output or "", axis)
        _say_repeated_activation(prepared, loss.kind, loss.output or "", axis)
    sentences = (
        describe_adapters(prepared),
        *describe_overlooked_states(prepared, losses[0].output or ""),
        describe_freed(prepared.freed),
        describe_decided(prepared.decided),
        "" if prepared.dequantized is None else prepared.dequantized.describe(),
        describe_separations(prepared.separations),
        describe_symmetric(prepared.ties, prepared.weights),
        describe_narrow(prepared.skeleton.graph),
    )
    for sentence in filter(None, sentences):
        _log.warning("%s", sentence)


def _say_repeated_activation(prepared: PreparedModel, loss: str, output: str, axis: int) -> None:
    """Log a warning if the loss applies an activation that the model applies as well."""
    given, trained = (
        map_values(form.graph)[output] for form in (prepared.skeleton, prepared.training)
    )
    repeated = find_repeated_activation(given, trained, loss, axis)
    if repeated is not None:
        names = (loss, CONTAINED[loss], output, repeated.kind, repeated.node.name)
        _log.warning(
            "%s applies a %s to '%s', which comes from the %s '%s' already, so scores are squashed "
            "twice; export the model without it, or see splitonnx check",
            *names,
        )


def _say_kept_scalings(prepared: PreparedModel) -> None:
    """Log a warning if weights are not trained because they only scale or shift raw inputs.

    Weights that the user froze or bound are not mentioned.
    """
    kept = [
        name
        for name in prepared.kept_scalings
        if name not in prepared.adjustments.bindings
        and not any(re.search(pattern, name) for pattern in prepared.freeze)
    ]
    if kept:
        names = (quote(kept), make_pattern(kept), make_pattern(kept))
        _log.warning(
            "%s: not trained, because only raw inputs are scaled or shifted by it, as by an "
            "image's mean and deviation; --train '%s' trains it, --freeze '%s' silences this",
            *names,
        )


def _list_bound(adjustments: Adjustments) -> dict[str, list[float]]:
    bound = adjustments.bindings
    return {name: np.asarray(value).ravel().tolist() for name, value in bound.items()}


def _say_class_axis(prepared: PreparedModel, output: str, axis: int) -> None:
    """Log a warning that the classes are on an axis other than 1 that the user did not name."""
    _log.warning(
        "cross-entropy takes the last axis of %s as the classes, since only its size is known; "
        "--class-axis %d says the same without this line",
        describe_scores(prepared.training.graph, output),
        axis,
    )


def _list_names(names: str | Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


@attribute_errors_to_pass("tried in training")
def refuse_untrainable(prepared: PreparedModel, output: str) -> None:
    """Check that a model can be trained with a loss computed from ``output``, wherever it is cut.

    Raises:
        NotDifferentiable: a node without a gradient is between a trained parameter and the output.
        UsageError: the output depends on no trained parameter.
    """
    graph = prepared.training.graph
    for fault in list_undifferentiable(graph, prepared.trainable, [output]):
        raise fault
    reached = {value.name for value in find_movers([map_values(graph)[output]])}
    if not reached.intersection(prepared.trainable):
        raise UsageError(NOTHING_TO_TRAIN)
