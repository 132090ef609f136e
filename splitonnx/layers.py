"""Tell layers of weights, which mix numbers, from weights that only scale or permute them.

Both halves need it: ``cut`` refuses to send what no layer has mixed, and ``explain`` shows which
layers are between data and what is sent.  A layer is a node of :data:`LAYERS` that reads a weight
where it multiplies or replaces numbers.  If each of its results is one number of the data times one
weight, as in a depthwise convolution of size 1 or a product with a permutation, it is not a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

LAYERS: Mapping[str, frozenset[int]] = {
    "Conv": frozenset({1}),
    "ConvTranspose": frozenset({1}),
    "DeformConv": frozenset({1}),
    "Einsum": frozenset(range(64)),
    "FusedMatMul": frozenset({0, 1}),
    "GRU": frozenset({1, 2}),
    "Gather": frozenset({0}),
    "Gemm": frozenset({0, 1}),
    "LSTM": frozenset({1, 2}),
    "MatMul": frozenset({0, 1}),
    "RNN": frozenset({1, 2}),
}
"""Operators that mix the numbers of their input by weights, or replace them by rows of a table.

Each is mapped to the positions among its inputs at which weights do so.
"""


_ELLIPSIS = "."
"""What stands for the three dots of an equation here."""
_ELLIPSES = "0123456789"
"""Labels of the axes that an ellipsis stands for; inputs share them from the last axis on."""
_MOST_LABELS = 26
"""A weight of an Einsum with more labels is not examined, and counts as a layer."""


MOVES = frozenset({"Cast", "Identity", "Transpose"})
"""Operators through which a weight is followed without computing what they make of it."""


@dataclass(frozen=True, kw_only=True)
class LayerNode:
    """A node of a graph, with the names of its inputs and outputs, which may be empty."""

    operator: str
    arguments: tuple[str, ...]
    results: tuple[str, ...]
    integers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    equation: str = ""


@dataclass(frozen=True, kw_only=True)
class _Use:
    """An input of a layer that is a weight, with the order of the weight's axes there."""

    node: LayerNode
    position: int
    order: tuple[int, ...] | None

    def link(self, array: np.ndarray) -> np.ndarray | None:
        """Return which numbers the weight connects at this input; see :func:`_link`.

        Nodes may come from a bundle that nobody checked, so an order may not fit the array.
        """
        order = self.order or tuple(range(array.ndim))[::-1]
        if self.order is None:
            turned = array
        elif sorted(order) == list(range(array.ndim)):
            turned = np.transpose(array, order)
        else:
            return None
        if not array.size:
            return None
        return _link(self.node, self.position, turned)


def may_mix(operator: str, weights: Collection[int]) -> bool:
    """Return whether an operator mixes numbers by the weights at some positions among its inputs.

    The gradient of an operator, such as ``ConvGrad``, does so wherever it reads them.
    """
    positions = LAYERS.get(operator)
    if positions is not None:
        return not positions.isdisjoint(weights)
    return bool(weights) and operator.removesuffix("Grad") in LAYERS


class Mixing:
    """What the weights of a graph do to the numbers that they meet.

    ``nodes`` are the nodes of the forward pass in order.  ``read`` returns the array of a weight,
    or of a value that is computed from weights alone, or ``None`` if there is none of this name; an
    array is read only when it is asked for.
    """

    def __init__(
        self, nodes: Iterable[LayerNode], read: Callable[[str], np.ndarray | None]
    ) -> None:
        self._read = read
        self._uses = _list_uses(nodes)
        self._kept: dict[str, tuple[bool, bool]] = {}

    def keeps_values(self, weight: str) -> bool:
        """Return whether layers of this weight pass on numbers of the data, scaled at most.

        At least half of the numbers that such a layer reads have a result of their own.
        """
        return self._measure(weight)[0]

    def keeps_gradients(self, weight: str) -> bool:
        """Return whether layers of this weight only scale and permute, so their gradients do, too.

        Each number has at most one result, and each result comes from at most one number.
        """
        return self._measure(weight)[1]

    def list_read(self) -> list[str]:
        """List the values that layers read as weights, behind no Transpose or Cast."""
        return list(self._uses)

    def _measure(self, weight: str) -> tuple[bool, bool]:
        if weight not in self._kept:
            uses = self._uses.get(weight, [])
            array = self._read(weight) if uses else None
            links = [None if array is None else use.link(array) for use in uses]
            self._kept[weight] = (
                bool(links) and all(own is not None and _keeps_values(own) for own in links),
                bool(links) and all(own is not None and _is_permutation(own) for own in links),
            )
        return self._kept[weight]


def _list_uses(nodes: Iterable[LayerNode]) -> dict[str, list[_Use]]:
    """List the layers that read each value, also behind a Transpose or a Cast."""
    uses: dict[str, list[_Use]] = {}
    moved: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    for node in nodes:
        for position, name in enumerate(node.arguments):
            source, order = moved.get(name, (name, None))
            if name and position in LAYERS.get(node.operator, ()):
                uses.setdefault(source, []).append(_Use(node=node, position=position, order=order))
        name = node.arguments[0] if node.arguments else ""
        source, order = moved.get(name, (name, None))
        for result in node.results[:1]:
            if node.operator in MOVES and node.operator != "Transpose":
                moved[result] = source, order
            elif node.operator == "Transpose" and order is None:
                moved[result] = source, tuple(node.integers.get("perm", ()))
    return uses


def _keeps_values(links: np.ndarray) -> bool:
    alone = links.sum(axis=(1, 2)) == 1  # (batch, out)
    if not alone.any():
        return False
    kept = (links & alone[:, None, None, :]).any(axis=(2, 3))  # (batch, in)
    read = links.any(axis=(2, 3))
    return bool(read.any()) and bool(2 * kept.sum() >= read.sum())


def _is_permutation(links: np.ndarray) -> bool:
    from_one = links.sum(axis=(1, 2)).max(initial=0) == 1
    return bool(from_one) and bool(links.sum(axis=(2, 3)).max(initial=0) == 1)


def _link(node: LayerNode, position: int, array: np.ndarray) -> np.ndarray | None:
    """Return which weights connect which inputs with which outputs, as booleans.

    The axes are groups whose numbers do not meet, inputs, positions of a kernel, and outputs.
    ``None`` means that a layer counts whatever its weights are.
    """
    linked = array != 0
    kind = node.operator
    if kind in ("Conv", "DeformConv") and linked.ndim > 2:
        return _link_convolution(linked, _read(node, "group", 1))
    if kind == "ConvTranspose" and linked.ndim > 2:
        return _link_transposed(linked, _read(node, "group", 1), node.integers.get("strides", ()))
    if kind in ("FusedMatMul", "Gemm", "MatMul") and linked.ndim:
        return _link_product(node, position, linked)
    if kind == "Einsum":
        return _link_einsum(node, position, array)
    if kind == "Gather" and linked.ndim == 2 and linked.shape[1] > 1:
        rows: np.ndarray = linked.T[None, :, None, :]
        return rows  # a unit vector says which row was read
    return None


def _read(node: LayerNode, name: str, default: int) -> int:
    return next(iter(node.integers.get(name, ())), default)


def _link_convolution(linked: np.ndarray, groups: int) -> np.ndarray | None:
    outputs, inputs = linked.shape[:2]  # (M, C / groups, kernel...)
    if groups < 1 or outputs % groups:
        return None
    grouped: np.ndarray = linked.reshape(groups, outputs // groups, inputs, -1)
    return grouped.transpose(0, 2, 3, 1)


def _link_transposed(linked: np.ndarray, groups: int, strides: Sequence[int]) -> np.ndarray | None:
    inputs, outputs, *kernel = linked.shape  # (C, M / groups, kernel...)
    if groups < 1 or inputs % groups:
        return None
    apart: np.ndarray = linked.reshape(groups, inputs // groups, outputs, -1)
    steps = [*strides, *[1] * (len(kernel) - len(strides))]
    if all(step >= size for step, size in zip(steps, kernel, strict=False)):
        return apart.reshape(groups, inputs // groups, 1, -1)  # no two positions overlap
    return apart.transpose(0, 1, 3, 2)


def _link_product(node: LayerNode, position: int, linked: np.ndarray) -> np.ndarray:
    if linked.ndim == 1:
        return linked.reshape(1, -1, 1, 1)
    is_turned = bool(_read(node, "transB" if position else "transA", 0)) is (position == 1)
    matrices = linked.reshape(-1, *linked.shape[-2:])
    if is_turned:
        matrices = matrices.transpose(0, 2, 1)
    return matrices[:, :, None, :]


def _link_einsum(node: LayerNode, position: int, array: np.ndarray) -> np.ndarray | None:
    terms, result = _read_equation(node.equation)
    if position >= len(terms):
        return None
    own, others = terms[position], set("".join(terms[:position] + terms[position + 1 :]))
    labels = _label_axes(own, array.ndim)
    if labels is None or len(set(zip(labels, array.shape, strict=True))) > len(set(labels)):
        return None
    if _ELLIPSIS in others:
        others.update(_ELLIPSES)
    if _ELLIPSIS in result:
        result += _ELLIPSES
    # A diagonal of the weight is read, and it is summed over axes that nothing else has.
    own = "".join(label for label in dict.fromkeys(labels) if label in others or label in result)
    linked = _sum_axes(array, labels, own) != 0
    shared = [axis for axis, label in enumerate(own) if label in others and label in result]
    summed = [axis for axis, label in enumerate(own) if label in others and label not in result]
    rest = [axis for axis in range(len(own)) if axis not in (*shared, *summed)]
    count = int(np.prod([linked.shape[axis] for axis in shared], dtype=int))
    inputs = int(np.prod([linked.shape[axis] for axis in summed], dtype=int))
    links: np.ndarray = linked.transpose(*shared, *summed, *rest).reshape(count, inputs, 1, -1)
    return links


def _read_equation(equation: str) -> tuple[list[str], str]:
    """Return the labels of each input and of the result, with one character for an ellipsis.

    Without an arrow, the result has the ellipsis and all labels that are there once.
    """
    given, arrow, result = equation.replace(" ", "").replace("...", _ELLIPSIS).partition("->")
    if not arrow:
        result = "".join(c for c in dict.fromkeys(given) if c == _ELLIPSIS or given.count(c) == 1)
    return given.split(","), result.replace(",", "")


def _label_axes(term: str, rank: int) -> str | None:
    """Return one label for each axis of an input, or ``None`` if its rank does not fit."""
    hidden = rank - len(term.replace(_ELLIPSIS, ""))
    most = len(_ELLIPSES) if term.count(_ELLIPSIS) == 1 else 0
    if not 0 <= hidden <= most or len(term) > _MOST_LABELS:
        return None
    return term.replace(_ELLIPSIS, _ELLIPSES[len(_ELLIPSES) - hidden :])


def _sum_axes(array: np.ndarray, labels: str, kept: str) -> np.ndarray:
    """Sum an array over the axes whose labels are not in ``kept``; equal labels take a diagonal."""
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    wide = array if array.dtype.kind == "f" and array.dtype.itemsize > 2 else array.astype(float)
    summed: np.ndarray = np.einsum(
        wide, [numbers[label] for label in labels], [numbers[label] for label in kept]
    )
    return summed
