"""Stop a run in which labels do not have the shape of the scores.

Before a run, labels are checked against the sizes that the manifest declares.  If a size of the
scores is only known in the run, the labels may have another one, and the formulas of losses would
repeat them, or kernels would read only as many scores as there are labels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import onnx_ir as ir

from splitonnx.expressions import UNKNOWN
from splitonnx.partitioner.graphs.assertions import BOOL, I64, note, pass_if, refuse_where
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.inference.dimensions import list_terms, parse_dim

REFUSED = "labels_of_another_shape_than_scores"
"""The name of the node that fails, which ONNX Runtime puts into its message."""


def list_sizes(inputs: Iterable[ir.Value]) -> set[str]:
    """List the named sizes of a model's inputs, to which a run compares the labels' sizes."""
    dims = [dim for value in inputs for dim in value.shape or () if not isinstance(dim, int)]
    return {dim.value for dim in dims if dim.value}


def check_labels(
    builder: NodeBuilder,
    labels: ir.Value,
    scores: ir.Value,
    sizes: Collection[str],
    *,
    has_classes: bool,
) -> ir.Value:
    """Return the labels, or a copy that exists only if their shape is that of the scores.

    If ``has_classes`` is true, axis 1 of the scores holds the classes, which labels do not have.
    Shapes of named sizes in ``sizes`` are not compared, because they were before the run.
    """
    dims = labels.shape or ()
    if all(isinstance(dim, int) or _is_known(dim, sizes) for dim in dims):
        return labels
    expected = note(builder.op("Shape", scores), I64)
    if has_classes:
        kept = builder.integers([0, *range(2, len(dims) + 1)])
        expected = note(builder.op("Gather", expected, kept, axis=0), I64)
    own = note(builder.op("Shape", labels), I64)
    equal = note(builder.op("Equal", own, expected), BOOL)
    zero = refuse_where(builder, note(builder.op("Not", equal), BOOL))
    failing = zero.producer()
    assert failing is not None
    failing.name = f"{failing.name}/{REFUSED}"
    return pass_if(builder, labels, zero)


def _is_known(dim: ir.SymbolicDim, sizes: Collection[str]) -> bool:
    """Return whether a size is computed from named sizes alone."""
    if dim.value is None or UNKNOWN in dim.value:
        return False
    return all(atom in sizes for atoms, _ in list_terms(parse_dim(dim.value)) for atom in atoms)
