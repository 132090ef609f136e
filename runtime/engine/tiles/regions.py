"""Find the parts of a stage graph that can be computed tile by tile, with the same bits.

Such a part has only elementwise operators whose result is rounded correctly, so that a value does
not depend on where in a tensor it is.  It reads inputs of the graph and single numbers, and only
the graph's outputs are read of it.  The update of a large parameter is such a part.  Nothing here
knows of parameters or optimizers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph, PlacedNode

FixedShape = tuple[int, ...]

EXACT = frozenset({"Abs", "Add", "Div", "Mul", "Neg", "Sqrt", "Sub"})
"""Operators whose result for an element depends on nothing else.

Min and Max are not among them: what they make of NaN may depend on the element's place.
"""
SMALLEST = 1 << 19
"""Elements from which tiles are faster: smaller tensors stay in cache anyway.

By processor time, Adam takes 1.1 times as long in tiles with 128 Ki elements, 0.9 times with 512 Ki
and 0.5 times with 4 Mi; SGD with momentum 1.2, 1.0 and 0.7 times.
"""
_FEWEST_NODES = 2
"""A single operator goes over its tensors once in any case."""
_ELEMENTWISE = EXACT | {"Cast", "Exp", "Identity", "Log", "Max", "Min", "Pow"}


@dataclass(frozen=True, kw_only=True)
class Region:
    """Nodes that can be computed tile by tile, in order; all their tensors have this ``shape``.

    ``arrays`` and ``scalars`` are the names of the values that they read: inputs of the graph of
    that shape, and float32 values of one element.  ``outputs`` are the graph's outputs that they
    compute.
    """

    nodes: tuple[PlacedNode, ...]
    shape: FixedShape
    arrays: tuple[str, ...]
    scalars: tuple[str, ...]
    outputs: tuple[str, ...]


def find_regions(graph: PlacedGraph) -> tuple[Region, ...]:
    """Find all regions of a graph, in the order of their first nodes."""
    results = [name for node in graph.nodes for name in node.results if name]
    fixed = graph.all_shapes
    large = {n for n in graph.inputs if n in graph.shapes and _count(fixed.get(n, ())) >= SMALLEST}
    if (
        not large
        or graph.has_bodies
        or len({*results, *graph.inputs}) < len(results) + len(graph.inputs)
    ):
        return ()
    shapes = _infer_shapes(graph)
    groups = _Groups()
    inside: list[PlacedNode] = []
    outside: list[PlacedNode] = []
    for node in graph.nodes:
        if _is_exact(node, large, shapes):
            groups.join([*(name for name in node.arguments if name in large), *node.results])
            large.update(node.results)
            inside.append(node)
        else:
            outside.append(node)
    needed = {name for node in outside for name in node.arguments}
    found: dict[str, list[PlacedNode]] = defaultdict(list)
    for node in inside:
        found[groups.find(node.results[0])].append(node)
    regions = (_describe(nodes, graph, large, shapes) for nodes in found.values())
    made = [
        (region, {name for node in region.nodes for name in node.results}) for region in regions
    ]
    return tuple(
        region
        for region, names in made
        if region.outputs and len(region.nodes) >= _FEWEST_NODES and not names & needed
    )


def find_replaced(graph: PlacedGraph, region: Region, sums: Mapping[str, str]) -> dict[str, str]:
    """Map the outputs of a region that can be written over an input to that input.

    ``sums`` maps inputs that may be changed to the outputs that take their place.  An element of
    such an input must be read by nothing but what makes the same element of the output.
    """
    makers = {node.results[0]: node for node in region.nodes}
    return {
        output: name
        for name, output in sums.items()
        if name in region.arrays
        and output in region.outputs
        and name in makers[output].arguments
        and graph.uses[name] == 1
    }


def _is_exact(node: PlacedNode, large: set[str], shapes: Mapping[str, FixedShape]) -> bool:
    """Return whether a node is exact, and all its tensors are large ones of one shape, or numbers.

    ``large`` has the names of large float32 values that are inputs, or made by such nodes.
    """
    if node.operator not in EXACT or node.domain or node.attributes or len(node.results) != 1:
        return False
    shape = shapes.get(node.results[0])
    if shape is None or not any(name in large for name in node.arguments):
        return False
    return all(
        shapes[name] == shape if name in large else _count(shapes[name]) == 1
        for name in node.arguments
    )


def _describe(
    nodes: list[PlacedNode], graph: PlacedGraph, large: set[str], shapes: Mapping[str, FixedShape]
) -> Region:
    made = [name for node in nodes for name in node.results]
    read = dict.fromkeys(name for node in nodes for name in node.arguments)
    return Region(
        nodes=tuple(nodes),
        shape=shapes[made[0]],
        arrays=tuple(name for name in read if name in large and name not in made),
        scalars=tuple(name for name in read if name not in large),
        outputs=tuple(name for name in made if name in graph.outputs),
    )


class _Groups:
    """Sets of names that were joined, directly or through others."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def find(self, name: str) -> str:
        """Return the name that stands for the set of ``name``."""
        while (parent := self._parents.setdefault(name, name)) != name:
            self._parents[name] = self._parents[parent]
            name = parent
        return name

    def join(self, names: Iterable[str]) -> None:
        """Make one set of the sets of all these names."""
        first, *others = map(self.find, names)
        self._parents.update(dict.fromkeys(others, first))


def _infer_shapes(graph: PlacedGraph) -> dict[str, FixedShape]:
    """Return the shapes of values, as far as they follow from inputs, constants and few operators.

    What the graph declares of values within it is not believed.
    """
    made = {name for node in graph.nodes if node.arguments for name in node.results}
    shapes = {name: shape for name, shape in graph.all_shapes.items() if name not in made}
    for node in graph.nodes:
        known = [shapes.get(name) for name in node.arguments]
        read = [shape for shape in known if shape is not None]
        if not read or len(read) < len(known) or node.domain or len(node.results) != 1:
            continue
        shape = _infer_shape(node, read, graph.constants)
        if shape is not None and node.results[0]:
            shapes[node.results[0]] = shape
    return shapes


def _infer_shape(
    node: PlacedNode, read: list[FixedShape], constants: Mapping[str, tuple[int, ...]]
) -> FixedShape | None:
    if node.operator in _ELEMENTWISE:
        return _broadcast(read)
    if node.operator == "Reshape" and len(read) == 2:
        wanted = constants.get(node.arguments[1], (0,))
        return wanted if min(wanted, default=1) > 0 else None
    if (
        node.operator == "Gather"
        and len(read) == 2
        and read[0]
        and not any(node.integers.get("axis", (0,)))
    ):
        return read[1] + read[0][1:]
    if node.operator == "ReduceSum" and len(read) == 1 and node.integers.get("keepdims") == (0,):
        return ()
    if node.operator == "Concat" and all(len(shape) == 1 for shape in read):
        return (sum(shape[0] for shape in read),)
    return None


def _broadcast(shapes: list[FixedShape]) -> FixedShape | None:
    if all(shape == shapes[0] for shape in shapes):
        return shapes[0]
    try:
        return np.broadcast_shapes(*shapes)
    except ValueError:
        return None


def _count(shape: FixedShape) -> int:
    return math.prod(shape)
