"""Estimates of how much memory a task needs, from its stages' graphs and the sizes of its tensors.

The estimate goes through each stage node by node.  A node's output is counted until its last use,
when ONNX Runtime frees it.  A stage's output is counted until the last stage that uses it has run,
or until the end of the task if the output is sent or kept.

Sizes come from the shapes that the graph declares.  If all dimensions of a shape but one are
numbers, and that one is unknown, it is assumed to be as large as the largest named dimension.  If
the size of a node's output is still unknown, the output is assumed to be as large as the node's
largest input if the operator never produces more elements than that, and otherwise as large as the
graph's largest value of known size.  Weights are not counted, because they are in memory even if
no task is running.  What a step of several micro-batches computes once and keeps
(:mod:`invariants`) is counted for each of them.  No stage is run for an estimate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from math import prod

from splitonnx.expressions import evaluate
from splitonnx.manifests import PartyManifest, Source
from splitonnx.runtime.engine.dataflows import Dataflow, list_early, list_steady
from splitonnx.runtime.engine.early.halves import find_first
from splitonnx.runtime.engine.invariants.divisions import find_origins
from splitonnx.runtime.engine.layouts.convolutions import block_placed
from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph
from splitonnx.runtime.engine.stage_graphs import Extent, Node, StageGraph, read_stage
from splitonnx.tensors import DTYPES, TensorSpec

FIXED = 1 << 20
"""Bytes that every task needs for bookkeeping, small tensors and buffers of the kernels."""
FRAGMENTATION = 1.35
"""Measured ratio between the memory that ONNX Runtime's arenas allocate and the memory in use."""

_LEAST_BLOCK = 8
"""Channels of a block on most processors (:mod:`layouts.convolutions`); others have 16."""
_ALIASES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators whose output shares the memory of their first input."""
_KEEPS = """
    Abs Add And ArgMax ArgMin BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Clip
    Cos Div Elu Equal Erf Exp Flatten Floor Gather GatherElements Gelu Greater GreaterOrEqual
    HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log LogSoftmax Max
    Mean Min Mish Mod Mul Neg Not Or PRelu Pow Reciprocal ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum Relu ReluGrad Reshape Round Scale ScatterElements ScatterND Selu
    Sigmoid SigmoidGrad Sign Sin Slice Softmax Softplus Softsign Sqrt Squeeze Sub Sum Tan Tanh
    TanhGrad Transpose Trilu Unsqueeze Where Xor
"""
_KEEPING = frozenset(_KEEPS.split())
"""Operators whose output has no more elements than the largest of their inputs."""


class Estimates:
    """Memory estimates for one party's tasks; ``graphs`` maps file names to the stages' graphs."""

    def __init__(self, manifest: PartyManifest, graphs: Mapping[str, bytes]) -> None:
        self._phases = {phase.name: phase for phase in manifest.phases}
        self._flows = {p.name: Dataflow(p, manifest.party) for p in manifest.phases}
        files = {stage.graph for phase in manifest.phases for stage in phase.stages}
        read = {file: read_stage(graphs[file]) for file in sorted(files)}
        self._graphs = {
            (phase.name, stage.name): _order(
                read[stage.graph], list_early(phase, stage, manifest.party)
            )
            for phase in manifest.phases
            for stage in phase.stages
        }
        self._origins = {
            (phase.name, stage.name): _find_origins(graphs[stage.graph], list_steady(phase, stage))
            for phase in manifest.phases
            for stage in phase.stages
        }
        self._measure = lru_cache(maxsize=256)(self._walk_phase)

    def measure(self, phase: str, sizes: Mapping[str, int]) -> int:
        """Estimate the peak memory in bytes of a task of the given phase.

        ``sizes`` maps the names of the task's dimensions to their sizes.
        """
        return self._measure(phase, tuple(sorted(sizes.items())))

    def _walk_phase(self, name: str, bindings: tuple[tuple[str, int], ...]) -> int:
        """Estimate the peak memory of a phase by going through its stages in order.

        A value that was sent counts until the end, because it is kept with the replies.
        """
        phase, flow, sizes = self._phases[name], self._flows[name], dict(bindings)
        given = [*phase.data, *(w.tensor for w in phase.wires if w.tensor.name in flow.receives)]
        held = {spec.name: _count_bytes(_describe(spec), sizes) or 0 for spec in given}
        sent = frozenset(flow.sends)
        uses = Counter(flow.uses)
        peak = kept = 0
        for stage in phase.stages:
            uses.update(flow.later.get(stage.name, {}))
            own = frozenset(i.name for i in stage.inputs if i.source is Source.STATE)
            walk = _Walk(self._graphs[name, stage.name], sizes)
            peak = max(peak, sum(held.values()) + walk.run(own))
            for value, origin in self._origins[name, stage.name].items():
                kept += walk.bytes.get(value, walk.bytes.get(origin, 0))
            wanted = [n for n in stage.outputs if uses[n] > 0 or n in flow.kept]
            held.update({n: walk.bytes[n] for n in wanted if n not in own})
            uses.subtract(flow.needs[stage.name])
            for value in flow.needs[stage.name]:
                if uses[value] <= 0 and value not in sent and value not in flow.kept:
                    held.pop(value, None)
        return FIXED + int((max(peak, sum(held.values())) + kept) * FRAGMENTATION)


class _Walk:
    """The estimate for one stage with known dimensions; ``bytes`` has the size of each value."""

    def __init__(self, graph: StageGraph, sizes: Mapping[str, int]) -> None:
        self._graph = graph
        self._sizes = sizes
        self.bytes: dict[str, int] = {}
        self._unknown: set[str] = set()
        self._measure_declared()
        self._largest = max(self.bytes.values(), default=0)
        self._measure_rest()

    def run(self, state: frozenset[str]) -> int:
        """Return the most bytes that are in use at the same time, without the stage's inputs."""
        graph = self._graph
        free = {*graph.inputs, *graph.constants, *state}
        owners = self._find_owners()
        last = self._find_last_uses(owners)
        kept = {owners.get(name, name) for name in graph.outputs}
        live: dict[str, int] = {}
        total = peak = 0
        for index, node in enumerate(graph.nodes):
            named = [n for n in node.results if n and n not in owners and n not in free]
            made = {name: self.bytes[name] for name in named}
            total += sum(made.values())
            live |= made
            peak = max(peak, total + self._count_scratch(node))
            for name in last.get(index, ()):
                if name in live and name not in kept and name not in free:
                    total -= live.pop(name)
        return peak

    def _measure_declared(self) -> None:
        for name, extent in self._graph.values.items():
            size = _count_bytes(extent, self._sizes)
            if size is None:
                self._unknown.add(name)
            else:
                self.bytes[name] = size

    def _measure_rest(self) -> None:
        for node in self._graph.nodes:
            inputs = [self.bytes.get(name, 0) for name in node.arguments]
            bound = max(inputs, default=0) if node.operator in _KEEPING else self._largest
            for name in node.results:
                self.bytes.setdefault(name, bound)
        for name in self._unknown:
            self.bytes.setdefault(name, self._largest)

    def _find_owners(self) -> dict[str, str]:
        """Map each value that shares another value's memory to that other value."""
        owners: dict[str, str] = {}
        outputs = set(self._graph.outputs)
        for node in self._graph.nodes:
            if node.operator in _ALIASES and node.results[0] not in outputs:
                source = node.arguments[0]
                owners[node.results[0]] = owners.get(source, source)
        return owners

    def _find_last_uses(self, owners: Mapping[str, str]) -> dict[int, list[str]]:
        """Map the number of each node to the values that are not needed after the node has run."""
        last: dict[str, int] = {}
        for index, node in enumerate(self._graph.nodes):
            for name in (*node.results, *node.arguments, *node.captured):
                last[owners.get(name, name)] = index
        by_node: dict[int, list[str]] = {}
        for name, index in last.items():
            by_node.setdefault(index, []).append(name)
        return by_node

    def _count_scratch(self, node: Node) -> int:
        """Estimate a kernel's own memory: columns, a copy in blocks, or a body's values."""
        if node.has_body:
            return 2 * self._largest
        place = _IMAGES.get(node.operator)
        if place is None:
            return 0
        image, kernel = place
        names = node.results if image < 0 else node.arguments
        dims = self._resolve(names[0 if image < 0 else image])
        window = self._resolve(node.arguments[kernel])
        columns = 4 * prod(window[1:]) * prod(dims[2:])
        if node.operator != "Conv" or not window or window[0] % _LEAST_BLOCK:
            return columns
        copies = (self.bytes.get(name, 0) for name in (node.arguments[0], node.results[0]))
        return max(columns, *copies)

    def _resolve(self, name: str) -> tuple[int, ...]:
        extent = self._graph.values.get(name)
        return (_resolve(extent, self._sizes) or ()) if extent else ()


_IMAGES: Mapping[str, tuple[int, int]] = {
    "Conv": (-1, 1),
    "ConvGrad": (0, 2),
    "ConvTranspose": (0, 1),
}
"""Operators that unfold an image into columns.

For each, the first number is the input whose size is the image's (-1 for the output), and the
second is the input with the convolution kernel.
"""


def _order(graph: StageGraph, early: Collection[str]) -> StageGraph:
    """Put what outputs ``early`` need first, if that is how the engine runs the graph."""
    first = () if any(n.has_body for n in graph.nodes) else find_first(graph.nodes, early)
    if not first:
        return graph
    numbered = sorted(enumerate(graph.nodes), key=lambda entry: entry[0] not in first)
    return replace(graph, nodes=tuple(node for _, node in numbered))


def _find_origins(graph: bytes, steady: Collection[str]) -> dict[str, str]:
    """Map what an engine may keep of a stage between micro-batches to the weights that it is."""
    if not steady:
        return {}
    blocked = block_placed(PlacedGraph(graph), _LEAST_BLOCK)
    return find_origins(PlacedGraph(blocked), steady)


def _describe(spec: TensorSpec) -> Extent:
    dims = tuple("" if dim is None else dim for dim in spec.shape)
    return Extent(bits=DTYPES[spec.dtype].itemsize * 8, dims=dims)


def _resolve(extent: Extent, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
    if extent.dims is None:
        return None
    found = [dim if isinstance(dim, int) else evaluate(dim, sizes) for dim in extent.dims]
    if found.count(None) == 1 and sum(isinstance(dim, str) for dim in extent.dims) == 1:
        found = [max(sizes.values(), default=1) if dim is None else dim for dim in found]
    known = tuple(max(dim, 0) for dim in found if dim is not None)
    return known if len(known) == len(found) else None


def _count_bytes(extent: Extent, sizes: Mapping[str, int]) -> int | None:
    dims = _resolve(extent, sizes)
    return None if dims is None else -(-prod(dims) * extent.bits // 8)
