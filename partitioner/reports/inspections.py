"""Inspect a model before cutting it: list the single tensors that divide it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import SplitonnxError, UsageError
from splitonnx.partitioner.cutting.bisections import Bisection, find_bisections
from splitonnx.partitioner.cutting.cuts import resolve_names
from splitonnx.partitioner.cutting.joints import declare
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import ModelSource, open_model
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.pauses import pause_collection
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.inference.folds import note_shapes
from splitonnx.partitioner.inference.shapes import infer_shapes
from splitonnx.tensors import DTYPES


@dataclass(frozen=True, kw_only=True)
class CutCandidate:
    """A single tensor at which the model can be cut in two.

    ``op`` is the operator that computes the tensor.  Each element of ``shape`` is a number if the
    dimension is known, else its symbol or ``None``.  ``bytes_up`` and ``bytes_down`` are the bytes
    sent in one training step: the activation to the server, and its gradient back (0 if nothing
    before the tensor is trained); they are ``None`` if the size is not known.  Parameters are
    counted in elements.  ``sent`` are the raw inputs that must be named beside the tensor;
    ``bytes_up`` includes them.
    """

    tensor: str
    op: str
    shape: tuple[int | str | None, ...]
    bytes_up: int | None
    bytes_down: int | None
    client_parameters: int
    server_parameters: int
    sent: tuple[str, ...] = ()


@pause_collection()
def inspect(
    model: ModelSource, *, batch: int | None = None, sent: Sequence[str] = ()
) -> list[CutCandidate]:
    """List the legal single-tensor cuts of a model, from its input to its output.

    Args:
        model: a path, the bytes of an ONNX model, or a loaded model.
        batch: the size of the first dimension of the model's inputs if it is not fixed; without
            it, sizes in bytes are not known for a model with a dynamic batch.
        sent: raw inputs, such as an attention mask, that may cross beside the tensor.

    Raises:
        ModelError: the model cannot be read or prepared.
        UnknownTensor, UsageError: a name in ``sent`` is not an input of the model.
    """
    return list_cuts(prepare(open_model(model)), batch, sent)


@attribute_errors_to_pass("searched for cuts")
def list_cuts(
    prepared: PreparedModel, batch: int | None, sent: Sequence[str] = ()
) -> list[CutCandidate]:
    """List the legal single-tensor cuts of a prepared model; this may change its inference form."""
    form = prepared.inference
    if batch is not None:
        _fix_batch(form, prepared, batch)
    open_inputs = resolve_names(form.graph, sent)
    for value in open_inputs:
        if value not in form.graph.inputs or value.name in prepared.state:
            raise UsageError(f"'{value.name}' is not an input of the model that could be sent")
    elements = {name: prepared.weights[name].size for name in prepared.trainable}
    found = find_bisections(form.graph, state=prepared.state, trainable=elements, sent=open_inputs)
    makers = map_values(prepared.skeleton.graph)
    return [_describe(each, makers) for each in found if not _loses_gradient(each)]


def _loses_gradient(bisection: Bisection) -> bool:
    """Return whether the tensor is not a float although it depends on trained parameters."""
    dtype = bisection.at[0].dtype
    return bisection.trained and not (dtype is not None and dtype.is_floating_point())


def _fix_batch(model: ir.Model, prepared: PreparedModel, batch: int) -> None:
    for value in model.graph.inputs:
        if value.name not in prepared.state and value.shape is not None and len(value.shape):
            dims = list(value.shape)
            if not isinstance(dims[0], int):
                value.shape = ir.Shape([batch, *dims[1:]])
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    infer_shapes(model)
    note_shapes(model.graph)


def _describe(bisection: Bisection, makers: Mapping[str, ir.Value]) -> CutCandidate:
    """Describe a cut; ``makers`` maps names to values of the original model, known to the user."""
    value, *sent = bisection.at
    producer = value.producer()
    assert producer is not None
    size = _measure(value)
    sizes = [size, *(_measure(other) for other in sent)]
    made = makers.get(value.name or "", value).producer()
    return CutCandidate(
        tensor=value.name or "",
        op=made.op_type if made is not None else producer.op_type,
        shape=_declare_shape(value)[0],
        bytes_up=None if None in sizes else sum(size or 0 for size in sizes),
        bytes_down=size if bisection.trained else 0,
        client_parameters=bisection.client,
        server_parameters=bisection.server,
        sent=tuple(other.name or "" for other in sent),
    )


def _declare_shape(value: ir.Value) -> tuple[tuple[int | str | None, ...], int]:
    """Return a value's shape as the manifest would declare it, and the bytes per element."""
    try:
        spec = declare(value)
    except SplitonnxError:
        return (), 0
    return spec.shape, DTYPES[spec.dtype].itemsize


def _measure(value: ir.Value) -> int | None:
    shape, itemsize = _declare_shape(value)
    known = [dim for dim in shape if isinstance(dim, int)]
    return math.prod(known) * itemsize if itemsize and len(known) == len(shape) else None
