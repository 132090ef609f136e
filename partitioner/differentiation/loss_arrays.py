"""Check that losses fit a model, and describe the arrays that they read beside its outputs.

Nothing is added to a graph here; :mod:`losses` does this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.losses import CROSS_ENTROPY, FROM_FILE, FROM_MODEL, LABELS, Loss
from splitonnx.names import COUNTED, LOSS, WEIGHT
from splitonnx.partitioner.differentiation.class_axes import (
    choose_class_axis,
    count_classes,
    list_dims,
    list_label_dims,
)
from splitonnx.partitioner.differentiation.loss_formulas import ACCURACY, list_formulas
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.inference.undecided_sizes import explain_unknown_rank
from splitonnx.tensors import TensorSpec, describe_dims


@dataclass(frozen=True, kw_only=True)
class LossGraph:
    """A loss that the user gave as an ONNX model, in the form of the model to be trained.

    ``training`` and ``inference`` are its two forms, each with one output, a scalar.  Their inputs
    are ``outputs``, which are outputs of the model, and ``arrays``, which are in the data, and
    ``weights``, which are constants.
    """

    training: ir.Model
    inference: ir.Model
    outputs: tuple[str, ...]
    arrays: tuple[TensorSpec, ...]
    weights: Mapping[str, ir.TensorProtocol]


WEIGHTS = (0, 2**31)
"""Where weights of samples are: a negative one would reward mistakes, and means divide by them."""

LossGraphs = Mapping[bytes | str, LossGraph]
"""Maps the files of losses to what they hold, or a model's output to the loss that it is."""


def find_graph(loss: Loss, graphs: LossGraphs) -> LossGraph | None:
    """Return the graph of a loss that has one of its own."""
    if loss.kind not in (FROM_FILE, FROM_MODEL):
        return None
    return graphs.get((loss.output or "") if loss.graph is None else loss.graph)


def list_losses() -> list[str]:
    """List the names of the losses that ``--loss`` accepts."""
    return [*list_formulas(), FROM_MODEL]


NO_GRAPHS: LossGraphs = {}
"""Nothing, for losses that are not the user's own."""


def list_reads(loss: Loss, graphs: LossGraphs) -> tuple[str, ...]:
    """List the outputs of the model that a loss reads."""
    file = find_graph(loss, graphs)
    return (loss.output or "",) if file is None else file.outputs


def fit_loss(
    graph: ir.Graph, loss: Loss, graphs: LossGraphs = NO_GRAPHS, scores: str | None = None
) -> tuple[TensorSpec, ...]:
    """Return descriptions of the arrays that a loss reads: the labels, then weights of samples.

    Return nothing for ``from-model``, which reads no arrays.  The graph is not changed.  ``scores``
    names the tensor that the loss is computed from, if it is not the loss's output.

    Raises:
        UsageError, UnsupportedModel: as raised by :func:`attach_losses`.
    """
    output = scores or list_reads(loss, graphs)[0]
    value = map_values(graph)[output]
    file = find_graph(loss, graphs)
    if file is not None:
        _refuse_settings(loss)
        for spec in file.arrays if loss.kind == FROM_FILE else ():
            _check_array("--loss", spec.name, graph)
        find_hidden(graph, list_new_names([loss], value, graphs))
        return file.arrays
    if loss.kind not in list_losses():
        raise UsageError(f"there is no loss '{loss.kind}'; choose from {', '.join(list_losses())}")
    if loss.kind == FROM_MODEL:
        refuse_no_loss(value)
    _check_array("--labels", loss.array, graph)
    if loss.sample_weights is not None:
        _check_array("--sample-weights", loss.sample_weights, graph)
    find_hidden(graph, list_new_names([loss], value, graphs))
    _refuse_settings(loss)
    if loss.kind == FROM_MODEL:
        return ()
    if value.shape is None or value.dtype is None or not value.dtype.is_floating_point():
        raise UnsupportedModel(
            f"output '{output}'",
            f"{loss.kind} needs a float tensor of known rank",
            advice=explain_unknown_rank(value) if value.shape is None else "",
        )
    if loss.kind == CROSS_ENTROPY:
        labels = _describe_classes(value, loss)
    else:
        labels = TensorSpec(name=loss.array, dtype="F32", shape=list_dims(value))
    return (labels, *_describe_weights(loss, labels))


def _refuse_settings(loss: Loss) -> None:
    """Refuse settings that the loss does not have.

    Raises:
        UsageError: a setting does not fit the loss.
    """
    arrays = {"--labels": loss.labels, "--sample-weights": loss.sample_weights}
    if loss.kind in (FROM_MODEL, FROM_FILE) and any(arrays.values()):
        names = " and ".join(name for name, given in arrays.items() if given)
        reads = (
            "no arrays beside the model's inputs"
            if loss.kind == FROM_MODEL
            else "the arrays that its inputs name"
        )
        raise UsageError(f"{names}: a loss {loss.kind} reads {reads}")
    classes = {
        "--class-axis": loss.class_axis is not None,
        "--label-smoothing": loss.label_smoothing != 0,
        "--class-weights": bool(loss.class_weights),
        "--ignore-index": loss.ignore_index is not None,
    }
    unfit = [name for name, given in classes.items() if given]
    if unfit and loss.kind != CROSS_ENTROPY:
        raise UsageError(f"{unfit[0]} is for {CROSS_ENTROPY}; {loss.kind} has no classes")


def _describe_classes(output: ir.Value, loss: Loss) -> TensorSpec:
    """Describe labels that are class indices."""
    axis = choose_class_axis(output, loss.class_axis)
    classes, ignored = count_classes(output, axis), loss.ignore_index
    if loss.class_weights and len(loss.class_weights) != classes:
        raise UsageError(
            f"--class-weights has {len(loss.class_weights)} numbers, but output '{output.name}' "
            f"has {classes} classes; give one number for each class"
        )
    is_class = ignored is None or 0 <= ignored < classes
    return TensorSpec(
        name=loss.array,
        dtype="I64",
        shape=list_label_dims(output, axis),
        bounds=(0, classes) if is_class or ignored is None else (0, classes, ignored),
    )


def _describe_weights(loss: Loss, labels: TensorSpec) -> Iterator[TensorSpec]:
    if loss.sample_weights is not None:
        if not labels.shape:
            raise UsageError("--sample-weights needs an output with one row for each sample")
        yield TensorSpec(
            name=loss.sample_weights, dtype="F32", shape=labels.shape[:1], bounds=WEIGHTS
        )


def refuse_no_loss(value: ir.Value) -> None:
    """Check that a value is a loss.

    Raises:
        UnsupportedModel: it is not a float32 scalar.
    """
    if value.dtype != ir.DataType.FLOAT or (value.shape is not None and len(value.shape)):
        raise UnsupportedModel(
            f"output '{value.name}'",
            f"a loss is a float32 scalar, this is {_write_type(value)}",
            "name the loss with --output",
        )


def _write_type(value: ir.Value) -> str:
    dims = ["?" if dim is None else str(dim) for dim in list_dims(value)] if value.shape else []
    return f"{'of unknown type' if value.dtype is None else value.dtype}[{', '.join(dims)}]"


def list_new_names(losses: Sequence[Loss], output: ir.Value, graphs: LossGraphs) -> Sequence[str]:
    """List the names that adding losses gives to values in the graph, or in an evaluation's.

    ``output`` is what the first loss is computed from.
    """
    if [loss.kind for loss in losses] == [FROM_MODEL] and losses[0].name is None:
        return () if output.name == LOSS else (LOSS,)
    own = [f"{result}.{loss.name}" for loss in losses if loss.name for result in (LOSS, ACCURACY)]
    arrays = [
        name
        for loss in losses
        if loss.kind not in (FROM_MODEL, FROM_FILE)
        for name in (loss.array, loss.sample_weights)
        if name is not None
    ]
    arrays += [
        spec.name for loss in losses if loss.graph is not None for spec in graphs[loss.graph].arrays
    ]
    results = [LOSS, ACCURACY, *own]
    combined = [f"{result}{end}" for result in results for end in (COUNTED, WEIGHT)]
    return tuple(dict.fromkeys([*arrays, *results, *combined]))


def _check_array(option: str, name: str, graph: ir.Graph) -> None:
    """Check that the name of an array that a loss reads is not used for anything else.

    Raises:
        UsageError: the name is empty, reserved, or that of a tensor of the model.
    """
    meant = {"--labels": "labels", "--sample-weights": "weights"}.get(option, "array")
    if not name:
        raise UsageError(f"{option} is empty; give the name of the {meant} in the data")
    reason = ""
    if name.partition(".")[0] in (LOSS, ACCURACY):
        reason = f"training returns its results as '{LOSS}' and '{ACCURACY}'"
    elif "@" in name or name.startswith("splitonnx."):
        reason = "names with '@' or 'splitonnx.' are for what splitonnx adds"
    elif name != LABELS and name in map_values(graph):
        reason = "the model has a tensor of this name"
    if reason:
        raise UsageError(f"{option} {name}: {reason}; give the {meant} another name")


def find_hidden(graph: ir.Graph, names: Sequence[str]) -> list[ir.Value]:
    """Find intermediate values of the model that have one of the names in ``names``.

    Raises:
        UnsupportedModel: an input or output of the model has one of these names.
    """
    values = map_values(graph) if names else {}
    found = [(name, values[name]) for name in names if name in values]
    for name, value in found:
        if value in graph.inputs or value.is_graph_output():
            raise _refuse_name(name, is_input=value in graph.inputs)
    return [value for _, value in found]


def _refuse_name(name: str, *, is_input: bool) -> UnsupportedModel:
    """Return the error for an input or output of the model with a name that a loss needs."""
    end, option = ("input", "input_names") if is_input else ("output", "output_names")
    rename = f"export the model with another name, such as with {option} in torch.onnx.export"
    kind, _, suffix = name.partition("@")[0].partition(".")
    if kind not in (LOSS, ACCURACY):
        reason = "the loss reads its labels or weights from the data under this name"
        others = "name the labels otherwise with --labels, or "
    else:
        reason = f"training returns a result of the loss as '{name}'"
        others = ""
        if suffix:
            others = (
                f"report the loss as another with name=, such as --loss mse,name={suffix}2, or "
            )
        elif kind == LOSS:
            others = f"use --loss from-model if the {end} is itself the loss, or "
    return UnsupportedModel(f"the model's {end} '{name}'", reason, f"{others}{rename}")


def find_class_axis(graph: ir.Graph, loss: Loss, graphs: LossGraphs = NO_GRAPHS) -> int:
    """Return the axis of the loss's output that holds the classes, or 1 if there are no classes.

    Raises:
        UsageError, UnsupportedModel: the output or the settings do not fit the loss.
    """
    fit_loss(graph, loss, graphs)
    if loss.kind != CROSS_ENTROPY:
        return 1
    return choose_class_axis(map_values(graph)[loss.output or ""], loss.class_axis)


def describe_scores(graph: ir.Graph, output: str) -> str:
    """Return the name and shape of an output as text for error messages."""
    return f"output '{output}' {describe_dims(list_dims(map_values(graph)[output]))}"
