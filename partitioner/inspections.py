"""What a user wants to know before cutting: the tensors that alone divide a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.errors import SplitonnxError, UsageError
from splitonnx.partitioner.cuts import Division, find_lost, find_single_cuts, resolve_names
from splitonnx.partitioner.faults import blame_stage
from splitonnx.partitioner.folds import note_shapes
from splitonnx.partitioner.frontiers import list_inputs, map_values, walk_back
from splitonnx.partitioner.gates import ModelSource, open_model
from splitonnx.partitioner.joints import declare
from splitonnx.partitioner.preparations import PreparedModel, prepare
from splitonnx.partitioner.shapes import infer_shapes
from splitonnx.tensors import DTYPES


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A tensor that alone divides the model in two.

    ``op`` is the operator that makes it.  ``shape`` has a number where the dimension is known,
    else its symbol or ``None``.  ``bytes_up`` and ``bytes_down`` are what travels in one training
    step: the activation up, its gradient down (0 where nothing before it is trained); ``None``
    where the size is not known.  Parameters are counted in elements.  ``sent`` are the raw inputs
    that must be named beside the tensor; they count among the bytes.
    """

    tensor: str
    op: str
    shape: tuple[int | str | None, ...]
    bytes_up: int | None
    bytes_down: int | None
    client_parameters: int
    server_parameters: int
    sent: tuple[str, ...] = ()


def inspect(model: ModelSource, *, batch: int | None = None, sent: Sequence[str] = ()) -> list[Cut]:
    """List the legal single-tensor cuts of a model, from its input to its output.

    Args:
        model: a path, the bytes of an ONNX model, or a loaded one.
        batch: the size of the first dimension of the model's inputs where it is not fixed;
            without it sizes in bytes are not known for a model with a dynamic batch.
        sent: raw inputs, such as an attention mask, that may cross beside the tensor.

    Raises:
        ModelError: the model cannot be read or prepared.
        UnknownTensor, UsageError: a name in ``sent`` is no input of the model.
    """
    return list_cuts(prepare(open_model(model)), batch, sent)


@blame_stage("searched for cuts")
def list_cuts(prepared: PreparedModel, batch: int | None, sent: Sequence[str] = ()) -> list[Cut]:
    """List the legal single-tensor cuts of a prepared model; its inference form may change."""
    form = prepared.inference
    if batch is not None:
        _fix_batch(form, prepared, batch)
    open_inputs = resolve_names(form.graph, sent)
    for value in open_inputs:
        if value not in form.graph.inputs or value.name in prepared.state:
            raise UsageError(f"'{value.name}' is no input of the model that could be sent")
    divisions = find_single_cuts(
        form.graph, state=prepared.state, trainable=prepared.trainable, sent=open_inputs
    )
    kept = [d for d in divisions if find_lost(d.at[:1], prepared.trainable) is None]
    return [_describe(division, prepared) for division in kept]


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


def _describe(division: Division, prepared: PreparedModel) -> Cut:
    value, *sent = division.at
    producer = value.producer()
    assert producer is not None
    size = _measure(value)
    sizes = [size, *(_measure(other) for other in sent)]
    made = map_values(prepared.skeleton.graph).get(value.name or "", value).producer()
    before = {v.name for v in walk_back([value])[1]}
    read = {v.name for node in division.server for v in list_inputs(node)}
    trained_before = any(name in before for name in prepared.trainable)
    return Cut(
        tensor=value.name or "",
        op=made.op_type if made is not None else producer.op_type,
        shape=_declare_shape(value)[0],
        bytes_up=None if None in sizes else sum(size or 0 for size in sizes),
        bytes_down=size if trained_before else 0,
        client_parameters=_count(prepared, before),
        server_parameters=_count(prepared, read),
        sent=tuple(other.name or "" for other in sent),
    )


def _declare_shape(value: ir.Value) -> tuple[tuple[int | str | None, ...], int]:
    """Give a value's shape as it would be declared, and the bytes of an element."""
    try:
        spec = declare(value)
    except SplitonnxError:
        return (), 0
    return spec.shape, DTYPES[spec.dtype].itemsize


def _measure(value: ir.Value) -> int | None:
    shape, itemsize = _declare_shape(value)
    known = [dim for dim in shape if isinstance(dim, int)]
    return math.prod(known) * itemsize if itemsize and len(known) == len(shape) else None


def _count(prepared: PreparedModel, names: set[str | None]) -> int:
    trained = [name for name in prepared.trainable if name in names]
    return sum(prepared.weights[name].size for name in trained)
