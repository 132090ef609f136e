"""Find the batch sizes that are fixed in a model's file, but free or different in the cut model.

The user frees a fixed size with ``--dim input:0=N`` and changes it with ``--dim input:0=4``.
Preparation also frees a batch of 1 that is fixed within the graph, without such an option
(:mod:`batches`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx
import onnx_ir as ir

from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.gate.gates import ModelSource, read_inputs

_NAME = re.compile(r"[A-Za-z_]\w*")
_COUNTS = (2, 3)
"""The numbers of pieces in the batches to compare, if the batch may have any size."""
Place = tuple[str, int]
"""The name of an input and one of its axes."""


@dataclass(frozen=True, kw_only=True)
class FreedBatch:
    """A size that is ``rows`` in a model's file, but is free or different in the cut model.

    ``places`` lists the axes of inputs that have this size.  ``sizes`` maps these axes, and those
    of other batch sizes that preparation frees, to the sizes for which the model in the file was
    exported.  To compare the two models, the cut model runs on a batch, and the model in the file
    runs on pieces of the batch that have ``rows`` rows.  ``counts`` lists the number of pieces in
    each batch to compare; it is empty if no comparison is possible.  ``options`` holds the options
    with which the user changed the size; it is empty if preparation freed the batch without one.
    """

    places: tuple[Place, ...]
    sizes: Mapping[Place, int]
    rows: int
    counts: tuple[int, ...]
    options: str = ""

    @property
    def is_batch(self) -> bool:
        """Return whether this is a batch size: the size of the first axis of an input."""
        return any(axis == 0 for _, axis in self.places)

    @property
    def axes(self) -> dict[str, int]:
        """Return the axis that has this size, for each input by name."""
        return dict(self.places)

    def fix(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """Return a copy of a model with its inputs fixed at the sizes in ``sizes``.

        The copy accepts one piece of a batch, that is, ``rows`` rows.
        """
        fixed = onnx.ModelProto()
        fixed.CopyFrom(model)
        del fixed.graph.value_info[:]
        for value in fixed.graph.input:
            for axis, dim in enumerate(value.type.tensor_type.shape.dim):
                if (size := self.sizes.get((value.name, axis))) is not None:
                    dim.dim_value = size
        for value in fixed.graph.output:
            for dim in value.type.tensor_type.shape.dim:
                dim.Clear()
        return fixed


def list_freed(source: ModelSource, prepared: PreparedModel) -> list[FreedBatch]:
    """List the fixed batch sizes of a model's file that are changed in a prepared model.

    Other fixed sizes that the user changed, such as a length, are listed with empty ``counts``.
    """
    if not prepared.adjustments.dims and not prepared.freed:
        return []
    dims = _read_dims(prepared)
    fixed = _read_fixed(read_inputs(source))
    changed = {place: fixed[place] for place, dim in dims.items() if fixed.get(place, dim) != dim}
    groups: dict[int | str, list[Place]] = {}
    for place in changed:
        groups.setdefault(dims[place], []).append(place)
    given = prepared.adjustments.dims
    asked = [
        replace(
            _make_asked(places, dims, changed),
            options=" ".join(
                f"--dim {name}:{axis}={given.get(f'{name}:{axis}', dims[name, axis])}"
                for name, axis in places
            ),
        )
        for places in groups.values()
    ]
    return asked or list(_list_unasked(prepared, dims))


def _make_asked(
    places: Sequence[Place], dims: Mapping[Place, int | str], changed: Mapping[Place, int]
) -> FreedBatch:
    size, rows = dims[places[0]], changed[places[0]]
    same = [place for place, dim in dims.items() if dim == size and isinstance(dim, str)]
    every = tuple(dict.fromkeys((*places, *same)))
    counts: tuple[int, ...] = _COUNTS
    if isinstance(size, int):
        counts = (size // rows,) if size % rows == 0 else ()
    is_batch = any(axis == 0 for _, axis in every)
    has_one_size = {changed[place] for place in places} == {rows}
    if not is_batch or not has_one_size or not _is_plain(every, dims):
        counts = ()
    return FreedBatch(
        places=every,
        sizes=dict.fromkeys(every, rows) | dict(changed),
        rows=rows,
        counts=counts,
    )


def _list_unasked(prepared: PreparedModel, dims: Mapping[Place, int | str]) -> Iterator[FreedBatch]:
    if not prepared.freed:
        return
    chosen = prepared.adjustments.chosen_sizes
    firsts = [
        dim
        for (_, axis), dim in dims.items()
        if axis == 0 and (isinstance(dim, str) or dim in chosen)
    ]
    open_sizes = {(n, a): d for (n, a), d in dims.items() if isinstance(d, str) or a == 0}
    sizes = {place: 1 for place, dim in open_sizes.items() if dim in firsts}
    for size in dict.fromkeys(firsts):
        places = tuple(place for place, dim in open_sizes.items() if dim == size)
        counts = (_COUNTS if isinstance(size, str) else (size,)) if _is_plain(places, dims) else ()
        given = {n: own for n, own in prepared.adjustments.dims.items() if own == size}
        options = " ".join(f"--dim {n}={own}" for n, own in given.items() if own in chosen)
        yield FreedBatch(places=places, sizes=sizes, rows=1, counts=counts, options=options)


def _is_plain(places: Sequence[Place], dims: Mapping[Place, int | str]) -> bool:
    """Return whether each input has a size on one axis only, and no other size depends on it."""
    own = {dims[place] for place in places if isinstance(dims[place], str)}
    names = {name for size in own for name in _NAME.findall(str(size))}
    others = (str(dim) for dim in dims.values() if dim not in own)
    once = len({name for name, _ in places}) == len(places)
    return once and not any(names.intersection(_NAME.findall(other)) for other in others)


def _read_dims(prepared: PreparedModel) -> dict[Place, int | str]:
    """Map each place of the prepared inputs to its size, with one name for sizes that are equal."""
    read: dict[Place, int | str] = {}
    for value in prepared.skeleton.graph.inputs:
        if value.name in prepared.state.difference(prepared.carried):
            continue
        for axis, dim in enumerate(value.shape or ()):
            known = dim.value if isinstance(dim, ir.SymbolicDim) else dim
            if known is not None:
                read[value.name or "", axis] = known
    return read


def _read_fixed(inputs: Sequence[onnx.ValueInfoProto]) -> dict[Place, int]:
    return {
        (value.name, axis): dim.dim_value
        for value in inputs
        for axis, dim in enumerate(value.type.tensor_type.shape.dim)
        if dim.dim_value > 0
    }
