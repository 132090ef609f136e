"""Group a model's weights by layer, as ``check`` lists them.

The weights of a layer have names with a common prefix, such as ``encoder.0.attention``.  A weight
with a name that has no prefix, such as ``onnx::MatMul_12``, is assigned to the node that uses it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from splitonnx.manifests import Role
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.traversals import list_inner
from splitonnx.partitioner.normalization.weights import INNER

_PARTS = re.compile(r"[./]")
_PASSING = frozenset(
    {"Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
_READS = re.compile(r"(ReadVariableOp|Read|Cast|Reshape)(_\d+)?(:\d+)?$")
"""The last part of a TensorFlow name, if it only describes how a variable was read."""


@dataclass(frozen=True, kw_only=True)
class LayerWeight:
    """A weight of a layer.

    ``role`` is ``parameter`` if the weight is trained, ``frozen`` if it is not, and ``buffer`` if
    it is a running statistic.  If the role may be wrong, ``doubt`` gives the reason.
    """

    name: str
    shape: tuple[int, ...]
    elements: int
    role: Role
    doubt: str | None = None


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A group of weights that belong together, and the operators that use them."""

    name: str
    operators: tuple[str, ...]
    weights: tuple[LayerWeight, ...]

    def count(self, role: Role) -> int:
        """Count the elements of all weights that have the given role."""
        return sum(weight.elements for weight in self.weights if weight.role is role)


@attribute_errors_to_pass("searched for its layers")
def list_layers(
    prepared: PreparedModel, doubts: Mapping[str, str], roles: Mapping[str, Role]
) -> tuple[Layer, ...]:
    """List the layers of a prepared model, in the order in which their weights are used.

    ``roles`` maps the name of each weight to its role.  ``doubts`` maps the names of some weights
    to the reason why their role may be wrong.
    """
    places = {
        inner: index
        for index, node in enumerate(prepared.skeleton.graph)
        for inner in (node, *list_inner(node))
    }
    found: dict[str, list[tuple[int, str, ir.Node | None]]] = {}
    for value in prepared.skeleton.graph.inputs:
        if value.name in prepared.roles:
            user = _find_user(value)
            place = len(places) if user is None else places.get(user, len(places))
            found.setdefault(name_layer(value), []).append((place, value.name or "", user))
    ordered = sorted(found.items(), key=lambda item: min(place for place, _, _ in item[1]))
    return tuple(
        Layer(
            name=name,
            operators=tuple(dict.fromkeys(u.op_type for _, _, u in weights if u is not None)),
            weights=tuple(
                _describe(prepared, own, roles[own], doubts.get(own)) for _, own, _ in weights
            ),
        )
        for name, weights in ordered
    )


def name_layer(value: ir.Value) -> str:
    """Return the name of the layer that a weight belongs to.

    ``value`` is the graph input that holds the weight.  A weight in a body whose own name another
    one has bears the name of the body's node in front; that is not its layer.
    """
    name = value.name or ""
    parts = _PARTS.split(name)
    holder = value.metadata_props.get(INNER)
    is_renamed = len(parts) == 2 and holder is not None and name.startswith(f"{holder}/")
    if len(parts) > 1 and not is_renamed and "::" not in name:
        last = 2 if len(parts) > 2 and _READS.match(parts[-1]) else 1
        return name[: len(name) - sum(len(part) + 1 for part in parts[-last:])]
    user = _find_user(value)
    return name if user is None else user.name or name


def _find_user(value: ir.Value) -> ir.Node | None:
    """Return the first node that uses a weight, other than casts and changes of its shape."""
    while (use := next(iter(value.uses()), None)) is not None:
        node = use.node
        if node.op_type not in _PASSING or node.domain or not node.outputs[0].uses():
            return node
        value = node.outputs[0]
    return None


def _describe(prepared: PreparedModel, name: str, role: Role, doubt: str | None) -> LayerWeight:
    tensor = prepared.weights[name]
    return LayerWeight(
        name=name,
        shape=tuple(int(dim) for dim in tensor.shape.numpy()),
        elements=tensor.size,
        role=role,
        doubt=doubt,
    )
