"""Find the axis of an output that holds the classes, and describe the labels that fit it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.tensors import describe_dims


def list_dims(value: ir.Value) -> tuple[int | str | None, ...]:
    """Return the dimensions of a value of known rank."""
    assert value.shape is not None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def choose_class_axis(output: ir.Value, given: int | None) -> int:
    """Return the axis of ``output`` that holds the classes, counted from 0.

    If ``given`` is a number, it is the axis; a negative number counts from the end.  If ``given``
    is ``None``, the result is axis 1, or the last axis if the size of axis 1 is not known.

    Raises:
        UnsupportedModel: the size of the axis is not known; or axis 1 and the last axis both fit,
            and the labels would have the same shape for both.
        UsageError: ``given`` is not an axis of ``output``, or is the axis of the batch.
    """
    dims = list_dims(output)
    subject, rank = f"output '{output.name}'", len(dims)
    described = describe_dims(dims)
    if given is not None and not (0 < given < rank or -rank < given < 0):
        raise UsageError(
            f"--class-axis {given} is not an axis of {subject} {described} behind the batch"
        )
    axes = (1, rank - 1) if given is None else (given % rank,)
    fitting = list(dict.fromkeys(axis for axis in axes if rank > 1 and isinstance(dims[axis], int)))
    if not fitting:
        raise UnsupportedModel(
            subject,
            f"cross-entropy needs scores of shape (N, C, ...) with C known, not {described}",
        )
    if len(fitting) > 1 and _without(dims, fitting[0]) == _without(dims, fitting[1]):
        raise UnsupportedModel(
            subject,
            f"its scores {described} may have their classes on axis 1 or on the last axis, and "
            f"labels {describe_dims(_without(dims, 1))} fit both",
            f"say which one is meant with --class-axis 1 or --class-axis {rank - 1}",
        )
    return fitting[0]


def count_classes(output: ir.Value, axis: int) -> int:
    """Return how many classes an output has on an axis whose size is known."""
    classes = list_dims(output)[axis]
    assert isinstance(classes, int)
    return classes


def list_label_dims(output: ir.Value, axis: int) -> tuple[int | str | None, ...]:
    """Return the shape of labels that are class indices: the output's without ``axis``."""
    return _without(list_dims(output), axis)


def move_classes(builder: NodeBuilder, scores: ir.Value, axis: int) -> ir.Value:
    """Move the axis of the classes to axis 1."""
    rank = len(list_dims(scores))
    if axis == 1:
        return scores
    order = [0, axis, *(other for other in range(1, rank) if other != axis)]
    moved = builder.op("Transpose", scores, perm=order)
    moved.type = scores.type
    moved.shape = ir.Shape([scores.shape[place] for place in order]) if scores.shape else None
    return moved


def _without(dims: Sequence[int | str | None], axis: int) -> tuple[int | str | None, ...]:
    return (*dims[:axis], *dims[axis + 1 :])
