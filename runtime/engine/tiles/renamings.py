"""Run a stage that only gives its inputs other names, without copying them.

ONNX Runtime copies the input of an Identity whose result is an output.  The update of a step of
several micro-batches reads the sums of gradients by another name, after such a stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph
from splitonnx.runtime.engine.tiles.feeds import check_feed
from splitonnx.runtime.engine.tiles.regions import FixedShape


@dataclass(frozen=True, kw_only=True)
class _Output:
    name: str


def find_sources(graph: PlacedGraph) -> dict[str, str]:
    """Map each output of a graph to the input that it is; empty if the graph computes anything.

    It is empty, too, unless all inputs are float32 tensors of fixed shapes: those of others are
    left to ONNX Runtime to check.
    """
    if graph.has_bodies or any(name not in _list_shapes(graph) for name in graph.inputs):
        return {}
    sources = {name: name for name in graph.inputs}
    for node in graph.nodes:
        is_plain = node.operator == "Identity" and not node.domain and len(node.results) == 1
        if not is_plain or node.argument(0) not in sources:
            return {}
        sources[node.results[0]] = sources[node.argument(0)]
    if any(name not in sources or name in graph.inputs for name in graph.outputs):
        return {}
    return {name: sources[name] for name in graph.outputs}


class RenamedSession:
    """A stage whose outputs are its inputs, with the methods of ONNX Runtime's sessions.

    ``sources`` maps each output to its input.  Nobody may write to either while there is the other.
    """

    def __init__(self, graph: PlacedGraph, sources: Mapping[str, str]) -> None:
        self.sources = sources
        self._shapes = _list_shapes(graph)

    def get_outputs(self) -> Sequence[_Output]:
        """Return the stage's outputs in order, each with its name."""
        return [_Output(name=name) for name in self.sources]

    def run_with_ort_values(
        self, names: Sequence[str], feeds: Mapping[str, Any], options: Any
    ) -> list[Any]:
        """Return the inputs that the outputs ``names`` are; ``options`` are not used.

        Raises:
            ValueError: an input is missing, or does not have the shape that the graph declares.
        """
        for name, shape in self._shapes.items():
            check_feed(name, feeds, shape)
        return [feeds[self.sources[name]] for name in names]


def _list_shapes(graph: PlacedGraph) -> dict[str, FixedShape]:
    """Return the shapes of inputs that are float32 tensors of fixed shapes."""
    return {
        name: graph.all_shapes[name]
        for name in graph.inputs
        if name in graph.shapes and name in graph.all_shapes
    }
