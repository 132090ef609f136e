"""Find constants that a network may have learned, so that the user can decide about them.

A constant is not trained unless the user names it.  Two groups of them may have been learned all
the same: single numbers that look like parameters, such as the scale of logits, and tensors in a
role in which constants are usual, such as a first state or an exponent, but with numbers that are
not usual there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.errors import count_some
from splitonnx.partitioner.normalization.constants.numbers import Place, is_uniform, is_usual
from splitonnx.partitioner.normalization.parameters import find_stored, list_uses
from splitonnx.partitioner.normalization.weights import list_constants

_MICROSOFT = "com.microsoft"
_PLACES: Mapping[tuple[str, str], Mapping[int, Place]] = {
    ("", "Attention"): {3: Place.MASK, 4: Place.STATE, 5: Place.STATE},
    ("", "CausalConvWithState"): {3: Place.STATE},
    ("", "Clip"): {1: Place.BOUND, 2: Place.BOUND},
    ("", "GRU"): {5: Place.STATE},
    ("", "GridSample"): {1: Place.GRID},
    ("", "LSTM"): {5: Place.STATE, 6: Place.STATE},
    ("", "LinearAttention"): {3: Place.STATE},
    ("", "OneHot"): {2: Place.VALUES},
    ("", "Pow"): {1: Place.EXPONENT},
    ("", "RNN"): {5: Place.STATE},
    ("", "Range"): {0: Place.RANGE, 2: Place.RANGE},
    ("", "RotaryEmbedding"): {1: Place.ROTATION, 2: Place.ROTATION},
    (_MICROSOFT, "Attention"): {4: Place.STATE, 5: Place.MASK},
    (_MICROSOFT, "RotaryEmbedding"): {2: Place.ROTATION, 3: Place.ROTATION},
}
"""The roles in which :mod:`parameters` takes a tensor for a constant, whatever its numbers."""
_BEGINNING = frozenset({Place.BOUND, Place.EXPONENT, Place.STATE})
"""Roles in which learned tensors often begin with equal numbers that are usual, such as zeros."""
_PLURALS: Mapping[Place, str] = {
    Place.RANGE: "ends of ranges",
    Place.VALUES: "pairs of values",
}
_FACTORS = frozenset({"Div", "Exp", "LayerNormalization", "Mul"})
"""Operators that multiply by a single number, which a network may have learned."""
_LITERAL = re.compile(
    r"(?i)(const|scalar|val_|ratio|dpa_|tensor).*|.*(::|eps|_output_\d+$).*|(?!.*ReadVariableOp).*/.*"
)
"""Names that exporters give to numbers that are written in a network's code."""
_LEARNED = re.compile(r"(?i)\.|alpha|beta|bias|gain|gamma|scale|temp|weight")
"""What the names of scalars that are parameters contain."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A constant that may have been learned, and the node and the role in which it is read."""

    name: str
    node: str
    operator: str
    place: Place


def find_kept(graph: ir.Graph) -> Iterator[Kept]:
    """Find the constants that are not trained because of the role in which an operator reads them.

    Constants whose numbers are usual in this role are left out.  Where PyTorch's exporters give a
    tensor the name of a parameter, such as ``pool.p``, equal numbers do not count as usual: a
    learned first state begins with zeros, and a learned exponent with 3.
    """
    for value, tensor in list_constants(graph):
        for node, index in list_uses(value):
            place = _PLACES.get((node.domain, node.op_type), {}).get(index)
            if place is not None and _may_be_learned_in(place, value, tensor, node):
                yield Kept(
                    name=value.name or "",
                    node=node.name or "",
                    operator=node.op_type,
                    place=place,
                )
                break


def _may_be_learned_in(
    place: Place, value: ir.Value, tensor: ir.TensorProtocol, node: ir.Node
) -> bool:
    name, array = value.name or "", tensor.numpy()
    uniform = is_uniform(array)
    is_literal = value.producer() is not None or _LITERAL.fullmatch(name) is not None
    if is_literal and uniform:
        return False
    if is_usual(place, array, _find_partner(value, node)):
        return uniform and place in _BEGINNING and "." in name
    return True


def _find_partner(value: ir.Value, node: ir.Node) -> np.ndarray | None:
    """Return the stored sines that a node reads with the cosines ``value``, or the reverse."""
    for other in node.inputs:
        tensor = None if other is None else ir.convenience.get_const_tensor(find_stored(other))
        if other is not None and tensor is not None and find_stored(other) is not value:
            places = _PLACES.get((node.domain, node.op_type), {})
            if node.inputs.index(other) in places:
                return tensor.numpy()
    return None


def describe_kept(kept: Sequence[Kept]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield a sentence for each operator and role in ``kept``, and the names of its constants."""
    groups: dict[tuple[str, Place], list[Kept]] = {}
    for one in kept:
        groups.setdefault((one.operator, one.place), []).append(one)
    for (operator, place), members in groups.items():
        names = tuple(one.name for one in members)
        if len(members) == 1:
            article = "an" if place[0] in "aeiou" else "a"
            reader = f"{operator} '{members[0].node}'"
            what = f"is not trained, since {reader} reads it as {article} {place}"
        else:
            plural = _PLURALS.get(place, f"{place}s")
            what = f"are not trained, since {operator} nodes read them as {plural}"
        pronoun, verb = ("it", "it was") if len(members) == 1 else ("them", "they were")
        yield (
            f"{count_some(names)} {what}, which most networks do not learn: train {pronoun} if "
            f"{verb} learned",
            names,
        )


def find_numbers(graph: ir.Graph) -> list[str]:
    """Return the names of the initializers that are single numbers that may have been learned."""
    return [
        value.name or ""
        for value, tensor in list_constants(graph)
        if value.producer() is None and _is_number_of_network(value, tensor)
    ]


def _is_number_of_network(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    """Return whether a constant is a single number that a network may have learned.

    Networks multiply by such numbers, and exporters give them names of parameters.  Other single
    numbers, such as the epsilon of a norm or the half in a GELU, are literals.
    """
    name = value.name or ""
    if tensor.size != 1 or _LITERAL.fullmatch(name):
        return False
    if not tensor.shape and (not _LEARNED.search(name) or _is_factor_of_code(tensor)):
        return False
    return any(node.op_type in _FACTORS for node, _ in list_uses(value))


def _is_factor_of_code(tensor: ir.TensorProtocol) -> bool:
    """Return whether a number is likely written in code, such as 0.5 or one over the root of 64."""
    number = abs(float(tensor.numpy()))
    squares = (number**2, 1 / number**2) if 0 < number < math.inf else ()
    return any(square > 1.5 and abs(square - round(square)) < 1e-5 * square for square in squares)


def describe_numbers(names: Sequence[str]) -> str:
    """Return a sentence about single numbers that may have been learned, but are not trained."""
    one = len(names) == 1
    what = "is a single number" if one else "are single numbers"
    return (
        f"{count_some(names)} {what} and not trained, like the epsilon of a norm: train "
        f"{'it if it was' if one else 'them if they were'} learned"
    )
