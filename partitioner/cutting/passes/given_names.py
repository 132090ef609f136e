"""Find tensors by the names in the user's model, and use only these names in errors.

Preparation adds tensors and nodes with names such as ``h/rewritten/3``.  Users cannot know these
names.  Patterns therefore do not match them, and errors name the tensor or node of the user's model
from which the added one was made.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import onnx_ir as ir

from splitonnx.errors import CutError, ModelError, NotAModel, UnknownTensor
from splitonnx.partitioner.graphs.traversals import map_values

_MADE = re.compile(r"'([^']+?)((?:[/.#][\w#]*)*/\d+(?:_\w+)?|_Grad[/\w]*)'")
"""A quoted name that a rewrite made: the name that it was made from, and what was added."""


def list_names(graph: ir.Graph) -> frozenset[str]:
    """Return the names of a graph's tensors and nodes."""
    return frozenset(map_values(graph)) | {node.name for node in graph if node.name}


def resolve_names(
    graph: ir.Graph, names: Sequence[str], given: Collection[str] = ()
) -> tuple[ir.Value, ...]:
    """Find the tensors that ``names`` refers to.

    Each name is the name of a tensor, the name of a node (which stands for its outputs that are
    used), or a glob pattern for tensor names.  ``given`` names the tensors and nodes of the user's
    model.  A pattern matches other tensors only if it matches none of these.

    Raises:
        UnknownTensor: a name or pattern matches nothing; the error suggests similar names.
    """
    values = map_values(graph)
    nodes = {node.name: node for node in graph if node.name}
    found: dict[str, ir.Value] = {}
    for name in names:
        for value in _resolve_name(name, values, nodes, given):
            found[value.name or ""] = value
    return tuple(found.values())


def _resolve_name(
    name: str, values: dict[str, ir.Value], nodes: dict[str, ir.Node], given: Collection[str]
) -> list[ir.Value]:
    if name in values:
        return [values[name]]
    if name in nodes:
        outputs = nodes[name].outputs
        return [value for value in outputs if value.uses() or value.is_graph_output()]
    own = [known for known in values if known in given]
    matches = fnmatch.filter(own, name) or fnmatch.filter(values, name)
    if not matches:
        known = dict.fromkeys([*own, *(node for node in nodes if node in given)])
        known = known or dict.fromkeys([*values, *nodes])
        raise UnknownTensor(name, difflib.get_close_matches(name, known, n=3, cutoff=0.5))
    return [values[known] for known in matches]


@contextmanager
def naming_as_given(given: Collection[str]) -> Iterator[None]:
    """Change errors raised in a ``with`` block so that they use only the names in ``given``.

    A name that a rewrite made is replaced by the name that it was made from.  Errors about names
    that the user entered are not changed.
    """
    try:
        yield
    except (UnknownTensor, NotAModel):
        raise
    except (CutError, ModelError) as error:
        if is_dataclass(error):
            for field in fields(error):
                content = getattr(error, field.name)
                if isinstance(content, str):
                    setattr(error, field.name, _use_given(content, given, field.name == "node"))
        raise


def _use_given(text: str, given: Collection[str], is_name: bool) -> str:
    quoted = f"'{text}'" if is_name else text
    changed = _MADE.sub(lambda found: _name_origin(found, given), quoted)
    return changed[1:-1] if is_name else changed


def _name_origin(found: re.Match[str], given: Collection[str]) -> str:
    """Return the quoted name of the tensor or node that a name was made from, if it is given."""
    name = found[0][1:-1]
    if name in given:
        return found[0]
    parts = re.split(r"(?=[/.#]|_Grad)", name)
    starts = ("".join(parts[:count]) for count in range(len(parts) - 1, 0, -1))
    return next((f"'{start}'" for start in starts if start in given), found[0])
