"""Explain why a value that a control-flow node needs, such as its condition, is not known.

There are three reasons.  The value may depend only on sizes of the model's inputs that are not
fixed, which the user can fix with ``--dim``.  It may depend only on inputs that are settings, such
as a sampling rate, which the user can fix with ``--bind``.  Otherwise, it depends on the data.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Collection, Sequence

import onnx_ir as ir

from splitonnx.errors import quote
from splitonnx.partitioner.graphs.traversals import list_inputs, reads_size
from splitonnx.partitioner.inference.dimensions import Dim, name_unknown
from splitonnx.partitioner.inference.inferences import Inference

_MOST_ELEMENTS = 8
"""The most integers that an input may have to count as a setting; a sample's data have more."""


def explain_unknown(value: ir.Value | None, graph: ir.Graph, known: Inference) -> str:
    """Return a phrase, beginning with ``depends on``, that explains why ``value`` is not known.

    The phrase names sizes or settings and the options that fix them, or only ``the data``.
    ``graph`` is the model's graph, and ``known`` holds the shapes and contents inferred for it.
    """
    sizes = None if value is None else list_open_sizes(value, graph, known)
    if sizes:
        return f"depends on {name_sizes(sizes)}"
    settings = None if value is None else list_settings(value, graph.inputs)
    if settings:
        return f"depends on {name_settings(settings)}"
    return "depends on the data"


def explain_unknown_rank(value: ir.Value) -> str:
    """Return a sentence about the first node before ``value`` whose result has no known rank.

    A Squeeze without axes drops each axis of size 1.  The sentence names the sizes that decide, and
    the options that fix them.  Return an empty string if there is no such node.
    """
    node = value.producer()
    while node is not None:
        unknown = [v for v in node.inputs if v is not None and v.shape is None and v.producer()]
        if not unknown:
            break
        node = unknown[0].producer()
    if node is None:
        return ""
    label = f"node '{node.name}' ({node.op_type})"
    data = node.inputs[0] if node.inputs else None
    if node.op_type != "Squeeze" or data is None or data.shape is None or node.graph is None:
        return f"the rank of what {label} computes is not known"
    atoms = {dim.value or "" for dim in data.shape if isinstance(dim, ir.SymbolicDim)}
    graph = node.graph.graph if isinstance(node.graph, ir.Function) else node.graph
    sizes = list_options(atoms, graph)
    fixing = f" depends on {name_sizes(sizes)}" if sizes else " is not known"
    return (
        f"{label} has no axes and drops each axis of size 1, so its rank{fixing}; or export the "
        "model again with the axis to drop, such as x.squeeze(1)"
    )


def name_settings(inputs: Sequence[str]) -> str:
    """Return a phrase with the names of inputs, and the ``--bind`` options that fix them."""
    options = " ".join(f"--bind {shlex.quote(name)}=VALUE" for name in inputs)
    noun, fix = ("the input", "fixes") if len(inputs) == 1 else ("the inputs", "fix")
    return f"{noun} {quote(inputs)}, which {options} {fix}"


def list_settings(value: ir.Value, inputs: Collection[ir.Value]) -> list[str]:
    """List the inputs of the model that a value depends on, if all of them may be settings.

    :func:`is_setting` decides which inputs may be settings.  Inputs that matter only by their size
    are ignored.  The list is empty if the value depends on any input that cannot be a setting, or
    on no input at all.  ``inputs`` are the inputs of the model.
    """
    found: dict[str, None] = {}
    pending, seen = [value], {value}
    while pending:
        each = pending.pop()
        node = each.producer()
        if ir.convenience.get_const_tensor(each) is not None or (node and reads_size(node)):
            continue
        if node is None:
            if each not in inputs or not is_setting(each):
                return []
            found[each.name or ""] = None
        else:
            fresh = [source for source in list_inputs(node) if source not in seen]
            seen.update(fresh)
            pending += fresh
    return sorted(found)


def is_setting(value: ir.Value) -> bool:
    """Return whether an input may be a setting: a scalar, or a few integers or Booleans."""
    if value.shape is None or value.dtype is None:
        return False
    sizes = [dim for dim in value.shape if isinstance(dim, int)]
    if len(sizes) < len(value.shape):
        return False
    return not sizes or (not value.dtype.is_floating_point() and math.prod(sizes) <= _MOST_ELEMENTS)


def name_sizes(sizes: Sequence[str]) -> str:
    """Return a phrase with the names of sizes, and the ``--dim`` options that fix them."""
    options = " ".join(f"--dim {size}=SIZE" for size in sizes)
    noun, fix = ("the size", "fixes") if len(sizes) == 1 else ("the sizes", "fix")
    return f"{noun} {quote(sizes)}, which {options} {fix}"


def list_open_sizes(value: ir.Value, graph: ir.Graph, known: Inference) -> list[str]:
    """List the sizes of inputs that a value depends on and that are not fixed.

    The sizes are named as in ``--dim``.  The list is empty if the value also depends on anything
    else, such as the data.  ``known`` holds the shapes and contents inferred for ``graph``.
    """
    atoms = _find_atoms(value, known)
    return [] if atoms is None else list_options(atoms, graph)


def list_options(atoms: set[str], graph: ir.Graph) -> list[str]:
    """List the input sizes that occur in ``atoms`` (unknown sizes), named as in ``--dim``.

    The list is empty if an atom contains no size of an input.
    """
    sizes = _list_input_sizes(graph)
    found: set[str] = set()
    for atom in atoms:
        options = {option for name, option in sizes if _is_part(name, atom)}
        if not options:
            return []
        found |= options
    return [option for _, option in sizes if option in found]


def _is_part(name: str, atom: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", atom) is not None


def _find_atoms(value: ir.Value, known: Inference) -> set[str] | None:
    """Return the unknown sizes that a value depends on, or ``None`` if it depends on other data."""
    atoms: set[str] = set()
    pending, seen = [value], {value}
    while pending:
        each = pending.pop()
        node, content = each.producer(), known.content(each)
        if content is not None:
            atoms |= {atom for dim in content.flat if isinstance(dim, Dim) for atom in dim.atoms}
        elif node is None:
            return None
        elif reads_size(node):
            dims = None if node.inputs[0] is None else known.shape(node.inputs[0])
            if dims is None:
                return None
            atoms |= {atom for dim in dims if isinstance(dim, Dim) for atom in dim.atoms}
        else:
            fresh = [source for source in list_inputs(node) if source not in seen]
            seen.update(fresh)
            pending += fresh
    return atoms


def _list_input_sizes(graph: ir.Graph) -> list[tuple[str, str]]:
    """List the open sizes of the inputs: their atoms, and their names for ``--dim``."""
    sizes: dict[str, str] = {}
    for value in graph.inputs:
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, int):
                continue
            unnamed = str(name_unknown(value.name or "", axis))
            sizes.setdefault(dim.value or unnamed, dim.value or f"{value.name}:{axis}")
    return list(sizes.items())
