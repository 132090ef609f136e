"""Report how a loss uses an output: which activation it skips, and where it expects the classes.

``cross-entropy`` contains a Softmax and ``bce-with-logits`` a Sigmoid.  If the model ends with the
same activation, the loss skips it where possible; otherwise the activation is applied twice.  By
default, ``cross-entropy`` expects the classes on axis 1, as PyTorch does, but language models have
them on the last axis.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import ModelError
from splitonnx.losses import CROSS_ENTROPY, LABELS, Loss, LossSource, complete_losses
from splitonnx.partitioner.cutting.conformance.comparisons import USUAL_BYTES
from splitonnx.partitioner.cutting.conformance.score_ranges import describe_probabilities
from splitonnx.partitioner.cutting.preparations import PreparedModel, choose_output
from splitonnx.partitioner.differentiation.activations.final_activations import (
    CONTAINED,
    find_activation,
)
from splitonnx.partitioner.differentiation.activations.spelled_activations import find_spelled
from splitonnx.partitioner.differentiation.activations.squashings import (
    SQUASHING,
    Squashing,
    find_repeated_activation,
)
from splitonnx.partitioner.differentiation.loss_arrays import (
    NO_GRAPHS,
    LossGraphs,
    find_class_axis,
    fit_loss,
    list_losses,
    list_reads,
)
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.traversals import map_values, walk_back
from splitonnx.partitioner.loss_files import read_loss_files
from splitonnx.partitioner.reports.remarks import Kind, Remark, make_option
from splitonnx.tensors import describe_dims

_CHANNELS_FIRST = frozenset(
    {"AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "GlobalAveragePool", "MaxPool",
     "Resize", "Upsample"}
)  # fmt: skip
_CHANNELS_LAST = frozenset({"Gemm", "MatMul"})

_NEEDS_AXIS = (
    "; cross-entropy fits as well, but only with --class-axis, since these labels fit both"
)


@dataclass(frozen=True, kw_only=True)
class TriedLosses:
    """The losses that are tried with a model.

    ``trained`` are added up and trained with; there are none if some loss does not fit, which
    ``obstacles`` explain.  ``fitting`` names the losses that fit, and ``outputs`` the outputs that
    they are computed from.  ``graphs`` holds the losses from files.
    """

    trained: tuple[Loss, ...]
    graphs: LossGraphs
    outputs: tuple[str, ...]
    fitting: tuple[str, ...]
    obstacles: tuple[str, ...]


@attribute_errors_to_pass("tried with the losses")
def try_losses(
    prepared: PreparedModel, source: LossSource | None, output: str | None
) -> TriedLosses:
    """Try the losses that the user chose, or each known loss, with a model.

    Without ``source``, each known loss is tried with ``output``, and the first one that fits is
    trained with.  ``output`` is also for the losses that name none; by default, it is the first
    float output.

    Raises:
        UsageError: there is no such loss or output, or a loss does not have a setting.
        ModelError: a file of a loss cannot be read or is not a loss of this model.
    """
    first = choose_output(prepared, output)
    losses, graphs = tuple(Loss(kind=kind, output=first) for kind in list_losses()), NO_GRAPHS
    if source is not None:
        losses = complete_losses(source, first, None, LABELS)
        losses, graphs = read_loss_files(prepared, losses, output)
    outputs = dict.fromkeys(name for loss in losses for name in list_reads(loss, graphs))
    for name in outputs:
        choose_output(prepared, name)
    fitting, reasons = [], []
    for loss in losses:
        try:
            fit_loss(prepared.training.graph, loss, graphs)
            fitting.append(loss)
        except ModelError as error:
            reasons.append(str(error))
    is_hindered = bool(reasons) if source is not None else not fitting
    trained = () if is_hindered else fitting if source is not None else fitting[:1]
    return TriedLosses(
        trained=tuple(trained),
        graphs=graphs,
        outputs=tuple(outputs),
        fitting=tuple(dict.fromkeys(loss.kind for loss in fitting)),
        obstacles=tuple(dict.fromkeys(reasons)) if is_hindered else (),
    )


def remark_on_losses(prepared: PreparedModel, tried: TriedLosses) -> Iterator[Remark]:
    """Yield remarks on how losses use the outputs that they are computed from.

    The remarks are about an activation at the end of the model that a loss skips or applies twice,
    and about the axis of the classes.
    """
    if not tried.trained:
        yield from _remark_on_axis_if_unclear(prepared, tried.outputs[0])
    found = [one for loss in tried.trained for one in _remark_on_loss(prepared, loss, tried)]
    yield from dict.fromkeys(found)


def _remark_on_loss(prepared: PreparedModel, loss: Loss, tried: TriedLosses) -> Iterator[Remark]:
    output = loss.output or ""
    value = map_values(prepared.skeleton.graph).get(output)
    trained = map_values(prepared.training.graph).get(output)
    if value is None or trained is None:
        return
    has_axis = loss.class_axis is not None
    if loss.kind in CONTAINED:
        is_unclear = loss.kind == CROSS_ENTROPY and not has_axis and _fits_either_axis(value)
        axis = 1 if is_unclear else find_class_axis(prepared.training.graph, loss)
        others = tried.fitting if len(tried.trained) == 1 else ()
        kinds = (loss.kind, *(kind for kind in others if kind != loss.kind))
        yield from _remark_on_activation(value, trained, kinds, axis, prepared.given)
        yield from _remark_on_likeness(prepared, loss.kind, output, axis)
    if loss.kind == CROSS_ENTROPY and not has_axis:
        yield from _remark_on_axis(value)
    elif loss.kind != CROSS_ENTROPY:
        yield from _remark_on_axis_if_unclear(prepared, output)


def _remark_on_axis_if_unclear(prepared: PreparedModel, output: str) -> Iterator[Remark]:
    value = map_values(prepared.skeleton.graph).get(output)
    if value is not None and output in map_values(prepared.training.graph):
        yield from _remark_on_axis(value) if _fits_either_axis(value) else ()


def _fits_either_axis(value: ir.Value) -> bool:
    """Return whether the same labels would fit classes on axis 1 and classes on the last axis."""
    dims = list(value.shape or ())
    return len(dims) > 2 and isinstance(dims[1], int) and dims[1:-1] == dims[2:]


def _remark_on_activation(
    value: ir.Value,
    trained: ir.Value,
    losses: Sequence[str],
    axis: int,
    given: Collection[str],
) -> Iterator[Remark]:
    """Yield a remark on an activation before ``losses[0]``, which fits best.

    ``value`` is the output before operators were rewritten, ``trained`` the one in the training
    form, where the loss skips activations.
    """
    name, loss = value.name or "", losses[0]
    found = find_activation(trained, loss, axis)
    if found is not None:
        yield Remark(
            kind=Kind.ACTIVATION_SKIPPED,
            sentence=f"'{name}' ends in a {found.kind}, which {loss} contains: the loss is "
            f"computed from '{found.source.name}' before it, so that it is applied once",
            names=(name, found.source.name or ""),
        )
        return
    repeated = find_repeated_activation(value, trained, loss, axis)
    if repeated is None:
        return
    others = [own for own in losses if own != loss and find_activation(trained, own) is not None]
    options = [make_option("--loss", own) for own in others[:1]]
    places = range(1, len(value.shape or ())) if loss == "cross-entropy" else ()
    fitting = [other for other in places if find_activation(trained, loss, other) is not None]
    if fitting:
        remedy = f"with the classes on axis {fitting[0]}, if they are there, it is skipped"
        options = [make_option("--class-axis", str(fitting[0]))]
    elif others:
        remedy = f"choose {others[0]}, which skips it, if the labels allow"
    else:
        remedy = _advise_export(value, repeated, axis, given)
    yield Remark(
        kind=Kind.ACTIVATION_TWICE,
        sentence=f"'{name}' comes from the {repeated.kind} '{repeated.node.name}', and {loss} "
        f"applies a {CONTAINED[loss]} to it once more, which squashes the scores twice: {remedy}",
        names=(name, repeated.node.name or ""),
        options=tuple(options),
    )


def _remark_on_likeness(
    prepared: PreparedModel, loss: str, output: str, axis: int
) -> Iterator[Remark]:
    """Yield a remark on an output that looks like probabilities, though no operator says so."""
    likeness = describe_probabilities(prepared, loss, output, axis, USUAL_BYTES)
    if likeness:
        yield Remark(
            kind=Kind.ACTIVATION_TWICE,
            sentence=f"'{output}' looks like probabilities: {likeness}, and "
            f"{loss} applies a {CONTAINED[loss]} to them, which "
            "squashes the scores twice: choose another loss, or a model whose output is the raw "
            "scores",
            names=(output,),
        )


def _advise_export(output: ir.Value, repeated: Squashing, axis: int, given: Collection[str]) -> str:
    """Advise to export an activation's input, if the model given has it and it holds the scores.

    A Softmax over another axis than that of the classes is a part of the model itself.  Behind a
    Concat the input of one activation holds only some of the scores.
    """
    source, made = repeated.source, repeated.node.outputs[0]
    behind, _ = walk_back([output], stop=repeated.node.outputs)
    is_joined = any(node.op_type == "Concat" for node in behind)
    is_part = repeated.kind == "Softmax" and axis not in _list_axes(made, axis)
    if is_joined or is_part or (source is not None and source.name not in given):
        return "choose another loss, or a model whose output is the raw scores"
    scores = "the scores before it" if source is None else f"'{source.name}'"
    return f"export the model with {scores} as its output"


def _list_axes(value: ir.Value, unknown: int) -> tuple[int, ...]:
    """Return the axes of the Softmax that makes a value, or ``unknown`` if its nodes hide them."""
    node = value.producer()
    rank = len(value.shape) if value.shape is not None else 0
    if node is not None and node.op_type == "Softmax":
        over = node.attributes.get_int("axis", -1)
        return (over, over + rank) if over < 0 else (over,)
    spelled = find_spelled(value)
    return (spelled.axes if spelled is not None else ()) or (unknown,)


def _remark_on_axis(value: ir.Value) -> Iterator[Remark]:
    dims = [d if isinstance(d, int) else d.value for d in value.shape or ()]
    if len(dims) < 3 or not isinstance(dims[1], int) or not isinstance(dims[-1], int):
        return
    made, is_unclear = _find_maker(value), _fits_either_axis(value)
    sure = made in _CHANNELS_FIRST or (made not in _CHANNELS_LAST and dims[1] != dims[-1])
    if sure and not is_unclear:
        return
    first, last = [dims[0], *dims[2:]], dims[:-1]
    name = value.name or ""
    usual = f"as {made} makes them" if made in _CHANNELS_FIRST else "as cross-entropy takes them"
    yield Remark(
        kind=Kind.CLASS_AXIS,
        sentence=f"'{name}' is {_show(dims)}, and its classes may be on axis 1 ({dims[1]} classes, "
        f"labels {_show(first)}, {usual}) or on the last axis ({dims[-1]} "
        f"classes, labels {_show(last)}, as language models have them)"
        f"{_NEEDS_AXIS if is_unclear else ''}",
        names=(name,),
        options=(make_option("--class-axis", "1"), make_option("--class-axis", "-1")),
    )


def _find_maker(value: ir.Value) -> str:
    """Return the operator that computed the scores, before activations and biases."""
    while (node := value.producer()) is not None and not node.domain:
        if node.op_type in _CHANNELS_FIRST | _CHANNELS_LAST:
            return node.op_type
        spelled = find_spelled(value)
        if spelled is not None and spelled.source is not None:
            shift = spelled.source.producer()  # the largest score may be subtracted first
            is_shifted = spelled.kind == "Softmax" and shift is not None and shift.op_type == "Sub"
            first = shift.inputs[0] if is_shifted and shift is not None else None
            value = spelled.source if first is None else first
            continue
        if node.op_type not in SQUASHING | {
            "Add",
            "Cast",
            "Identity",
            "LogSoftmax",
            "Relu",
            "Tanh",
        }:
            break
        open_inputs = [v for v in node.inputs if v is not None and v.producer() is not None]
        if len(open_inputs) != 1:
            break
        value = open_inputs[0]
    return ""


def _show(dims: Sequence[int | str | None]) -> str:
    return f"({describe_dims(dims)[1:-1]})"
