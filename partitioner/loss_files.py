"""Read losses that users give as ONNX models, and prepare them to be added to a model.

A loss's file passes the same gate as a model, and is brought to the same form.  Its inputs are
outputs of the model and arrays in the data; its sizes are those of the model's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import onnx_ir as ir

from splitonnx.errors import UnsupportedModel, UsageError, quote
from splitonnx.losses import Loss
from splitonnx.manifests import KEY, Role
from splitonnx.partitioner.cutting.ports import declare
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.differentiation.class_axes import list_dims
from splitonnx.partitioner.differentiation.loss_arrays import LossGraph, LossGraphs
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.inference.folds import note_shapes
from splitonnx.partitioner.normalization.opsets import adapt_opset, inline_functions
from splitonnx.partitioner.rewrites import rewrite
from splitonnx.tensors import describe_dims

_FILE = "the loss's file"


@attribute_errors_to_pass("given the losses from files")
def read_loss_files(
    prepared: PreparedModel, losses: Sequence[Loss], output: str | None
) -> tuple[tuple[Loss, ...], LossGraphs]:
    """Return the losses, with an output for each from a file, and the content of the files.

    ``output`` is the output that the user named for losses that do not name one.

    Raises:
        ModelError: a file is not a model, or cannot be prepared.
        UnsupportedModel: a file is not a loss of this model.
        UsageError: a loss from a file does not read the output that the user named for it.
    """
    graphs: dict[bytes | str, LossGraph] = {
        loss.graph: _read(prepared, loss.graph) for loss in losses if loss.graph is not None
    }
    completed = []
    for loss in losses:
        if loss.graph is not None:
            reads = graphs[loss.graph].outputs
            named = loss.output or (output if len(losses) == 1 else None)
            if named is not None and named not in reads:
                raise UsageError(f"{_FILE} does not read output '{named}'; it reads {quote(reads)}")
            loss = msgspec.structs.replace(loss, output=named or reads[0])
        completed.append(loss)
    return tuple(completed), graphs


def _read(prepared: PreparedModel, content: bytes) -> LossGraph:
    model = open_model(content)
    target = prepared.training.graph
    outputs = {value.name or "": value for value in prepared.inference.graph.outputs}
    graph = model.graph
    inputs = {v.name or "": v for v in graph.inputs if v.name not in graph.initializers}
    reads = tuple(name for name in inputs if name in outputs)
    if not reads:
        raise UnsupportedModel(
            _FILE,
            f"it reads no output of the model: its inputs are {quote(list(inputs))}, and the "
            f"model's outputs {quote(list(outputs))}",
            "name its inputs as outputs of the model, and the others as arrays in the data",
        )
    weights = prepared.weights.keys() - prepared.carried.keys()
    own = {value.name or "" for value in target.inputs if value.name not in weights}
    if raw := sorted(own.intersection(inputs)):
        raise UnsupportedModel(
            _FILE,
            f"it reads the model's input {quote(raw)}",
            "give the loss an array of its own, which may hold the same numbers",
        )
    _fit_sizes(inputs, {name: outputs[name] for name in reads})
    inline_functions(model)
    adapt_opset(model, target.opset_imports[""])
    made = prepare(model)
    _refuse_unfit(made, target)
    rewrite(made.training, reads)  # gradients pass to what it reads, not to weights of its own
    note_shapes(made.training.graph)
    form = {value.name or "": value for value in made.training.graph.inputs}
    arrays = tuple(declare(form[name]) for name in inputs if name in form and name not in reads)
    kept = tuple(name for name in reads if name in form)
    return LossGraph(
        training=made.training,
        inference=made.inference,
        outputs=kept,
        arrays=arrays,
        weights=made.weights,
    )


def _fit_sizes(inputs: Mapping[str, ir.Value], outputs: Mapping[str, ir.Value]) -> None:
    """Give a loss's inputs the sizes of the model's outputs, in place.

    Raises:
        UnsupportedModel: an input has another type, rank or fixed size than the output.
    """
    sizes: dict[str, int | ir.SymbolicDim] = {}
    for name, output in outputs.items():
        value = inputs[name]
        wanted, found = _show(output), _show(value)
        fits = value.dtype == output.dtype and output.shape is not None
        if value.shape is not None and output.shape is not None:
            fits = fits and len(value.shape) == len(output.shape)
            for own, dim in zip(value.shape, output.shape, strict=False):
                if isinstance(own, int):
                    fits = fits and own == dim
                elif own.value is not None:
                    fits = fits and sizes.setdefault(own.value, dim) == dim
        if not fits:
            raise UnsupportedModel(
                _FILE,
                f"its input '{name}' is {found}, and the model's output is {wanted}",
                "export the loss for this type and these sizes; sizes that vary, such as the "
                "batch, need a name (dynamic_axes or dynamic_shapes in torch.onnx.export)",
            )
    for name, value in inputs.items():
        if name in outputs:
            value.shape = outputs[name].shape
        elif value.shape is not None:
            value.shape = ir.Shape(
                [d if isinstance(d, int) else sizes.get(d.value or "", d) for d in value.shape]
            )


def _show(value: ir.Value) -> str:
    dims = "unknown rank" if value.shape is None else describe_dims(list_dims(value))
    return f"{value.dtype} {dims}"


def _refuse_unfit(made: PreparedModel, target: ir.Graph) -> None:
    """Check that a prepared file computes one number, and the same number from the same inputs.

    Raises:
        UnsupportedModel: it does not.
    """
    results = made.training.graph.outputs
    reason = ""
    if len(made.skeleton.graph.outputs) != 1 or len(results) != 1:
        reason = f"it has {len(made.skeleton.graph.outputs)} outputs, not one that is the loss"
    elif results[0].dtype != ir.DataType.FLOAT or results[0].shape is None or len(results[0].shape):
        reason = f"its output '{results[0].name}' is {_show(results[0])}, not a float32 scalar"
    elif any(value.name == KEY for value in made.training.graph.inputs):
        reason = "it draws random numbers"
    elif Role.BUFFER in made.roles.values():
        reason = "it keeps running statistics"
    elif made.freed or made.decided:
        reason = f"it has a batch of 1 in {quote([*made.freed, *made.decided])}"
    elif made.training.graph.opset_imports[""] != target.opset_imports[""]:
        reason = "it needs another opset than the model"
    if reason:
        raise UnsupportedModel(_FILE, reason)
