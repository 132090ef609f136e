"""Find the cuts that are legal for training and for prediction alike.

A prepared model has a form for each, and both are divided at the same tensors.  They differ in
their nodes, and in their ends: training ends in the losses, prediction in the outputs.  A loss that
is part of the model is left out of prediction where :mod:`model_losses` separates it.  This module
knows how ``cut`` treats each form, but neither builds gradients nor describes what is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from splitonnx.errors import CutError, SplitonnxError, UsageError
from splitonnx.losses import FROM_MODEL, LABELS, Loss, LossSource, complete_losses
from splitonnx.partitioner.cutting.candidates.bisections import Bisection, find_bisections
from splitonnx.partitioner.cutting.carried_states.placements import place_states
from splitonnx.partitioner.cutting.divisions import divide_training
from splitonnx.partitioner.cutting.passes.given_names import resolve_names
from splitonnx.partitioner.cutting.ports import declare
from splitonnx.partitioner.cutting.preparations import PreparedModel, choose_output
from splitonnx.partitioner.differentiation.loss_arrays import fit_loss, list_reads
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.readings import copy_model
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.loss_files import read_loss_files
from splitonnx.partitioner.model_losses import list_predicted, separate_losses


@dataclass(frozen=True, kw_only=True)
class ReadOutputs:
    """The outputs from which losses are computed, and the losses that are part of the model."""

    names: tuple[str, ...]
    own: tuple[Loss, ...] = ()


@attribute_errors_to_pass("searched for the outputs that its losses read")
def find_read_outputs(
    prepared: PreparedModel, source: LossSource | None, output: str | None
) -> ReadOutputs:
    """Find the outputs from which the losses of a cut are computed, as ``cut`` does.

    Without ``source``, the loss is computed from ``output``, by default the first float output.  If
    that output is a single number, it is itself the loss.

    Raises:
        ModelError: the file of a loss cannot be read, or a loss does not fit the model.
        UsageError: there is no such output or loss, or the loss does not have a setting.
    """
    first = choose_output(prepared, output)
    if source is None:
        value = map_values(prepared.training.graph)[first]
        is_loss = value.dtype == ir.DataType.FLOAT and value.shape == ir.Shape([])
        return ReadOutputs(
            names=(first,), own=(Loss(kind=FROM_MODEL, output=first),) if is_loss else ()
        )
    losses = complete_losses(source, first, None, LABELS)
    losses, graphs = read_loss_files(prepared, losses, output)
    names = dict.fromkeys(name for loss in losses for name in list_reads(loss, graphs))
    for name in names:
        choose_output(prepared, name)
    for loss in losses:
        fit_loss(prepared.training.graph, loss, graphs)
    own = tuple(loss for loss in losses if loss.kind == FROM_MODEL)
    return ReadOutputs(names=tuple(names), own=own)


def find_legal_cuts(
    prepared: PreparedModel,
    elements: Mapping[str, int],
    sent: Sequence[str],
    reads: ReadOutputs,
) -> list[Bisection]:
    """Find the single tensors at which ``cut`` divides both forms, in the order of the graph.

    ``elements`` maps each parameter to the number of its trained elements.  The raw inputs in
    ``sent`` may be sent together with each tensor.

    Raises:
        TooManyTries: finding them would take too long.
        UnknownTensor, UsageError: a name in ``sent`` is not an input.
    """
    trained = _list_trained(prepared, elements, sent, reads.names)
    found = []
    for form, left in list_forms(prepared, reads.own):
        graph = form.inference.graph
        bisections = find_bisections(
            graph,
            state=form.state,
            trainable=elements,
            sent=resolve_sent(graph, list_predicted(form, sent, prepared), form),
        )
        found += [each for each in bisections if each.at[0].name not in left]
    joined = (_join(prepared.inference.graph, each, trained) for each in found)
    return [
        each
        for each in joined
        if each is not None
        and not _loses_gradient(each)
        and all(can_travel(value) for value in each.at)
        and keeps_states(prepared, each.at, (), reads.names)
    ]


def list_forms(
    prepared: PreparedModel, own: Sequence[Loss]
) -> Iterator[tuple[PreparedModel, set[str]]]:
    """Yield the models that predict, each with the names of tensors that one before it has.

    The first does not have the losses in ``own``, if they can be separated from it; the second is
    for cuts within these losses.
    """
    predicted, _ = separate_losses(prepared, own, ())
    yield predicted, set()
    if predicted is not prepared:
        yield prepared, set(map_values(predicted.inference.graph))


def _join(
    graph: ir.Graph, predicted: Bisection, trained: Mapping[str, Sequence[str]]
) -> Bisection | None:
    """Return a valid cut of the form that predicts, with what the training form sends beside it.

    Return ``None`` if it is not a valid cut of the training form.  ``trained`` maps the tensors
    that are to the names of all tensors of the cut.
    """
    beside = trained.get(predicted.at[0].name or "")
    if beside is None:
        return None
    names = {value.name for value in predicted.at}
    more = [value for value in graph.inputs if value.name in beside and value.name not in names]
    return replace(predicted, at=(*predicted.at, *more))


def resolve_sent(
    graph: ir.Graph, sent: Sequence[str], prepared: PreparedModel
) -> tuple[ir.Value, ...]:
    """Return the graph's values for the raw inputs that ``sent`` names.

    Raises:
        UnknownTensor, UsageError: a name is not an input of the model.
    """
    found = resolve_names(graph, sent, prepared.given)
    for value in found:
        if value not in graph.inputs or value.name in prepared.state:
            raise UsageError(f"'{value.name}' is not an input of the model that could be sent")
    return found


def _list_trained(
    prepared: PreparedModel,
    elements: Mapping[str, int],
    sent: Sequence[str],
    outputs: Sequence[str],
) -> dict[str, list[str]]:
    """Map each tensor that is a valid cut of the training form to all tensors of this cut.

    Only the outputs with a loss are considered.  The training form differs from the inference form
    where operators were rewritten: two results of one node may become two paths.
    """
    graph = prepared.training.graph
    kept, values = list(graph.outputs), map_values(graph)
    graph.outputs[:] = [values[output] for output in outputs]
    try:
        found = find_bisections(
            graph,
            state=prepared.state,
            trainable=elements,
            sent=resolve_names(graph, sent, prepared.given),
        )
    finally:
        graph.outputs[:] = kept
    return {
        each.at[0].name or "": [value.name or "" for value in each.at]
        for each in found
        if all(can_travel(value) for value in each.at)
    }


def keeps_states(
    prepared: PreparedModel,
    at: Sequence[ir.Value],
    tail_at: Sequence[ir.Value],
    outputs: Sequence[str],
) -> bool:
    """Return whether a cut leaves each state of the model to one party."""
    if not prepared.states:
        return True
    graph = copy_model(prepared.training).graph
    names, tail = ([value.name or "" for value in end] for end in (at, tail_at))
    try:
        place_states(prepared, graph, divide_training(prepared, graph, names, tail, outputs))
    except CutError:
        return False
    return True


def can_travel(value: ir.Value) -> bool:
    """Return whether a tensor can be sent: its element type and its rank must be known."""
    try:
        declare(value)
    except SplitonnxError:
        return False
    return True


def _loses_gradient(bisection: Bisection) -> bool:
    """Return whether a cut would block gradients.

    This is so if the tensor depends on trained parameters but is not a float.
    """
    dtype = bisection.at[0].dtype
    return bisection.trained and not (dtype is not None and dtype.is_floating_point())
