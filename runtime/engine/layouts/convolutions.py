"""Have convolutions run on images in blocked layout, which ONNX Runtime computes fastest.

In that layout, called NCHWc, the values of 8 or 16 channels lie side by side for each pixel.  A
Conv becomes three nodes: one brings its input into the layout, one convolves, and one brings the
output back.  Weights are rearranged by standard operators, as there is no operator for it.  ONNX
Runtime does the same by itself only where weights are constants.

A node's choice depends on nothing but its own weights' shape and groups, which are the same
wherever the model is cut.  Each output is thus the same to the bit in a split and an unsplit run.
(Source: the kernels in onnxruntime, core/mlas/lib/snchwc.cpp, and core/optimizer/
nchwc_transformer.cc, version 1.19.2.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph, PlacedNode, Shape
from splitonnx.runtime.engine.layouts.messages import (
    write_attribute,
    write_constant,
    write_model,
    write_node,
    write_opset,
)

DOMAIN = "com.microsoft.nchwc"
WIDE = 512
"""Input channels from which the plain kernel, one product of matrices, is the faster one."""
_MOVES = frozenset({"Reshape", "Slice", "Transpose"})
"""Operators that only rearrange what blocked nodes take from where it comes from."""


def block_convolutions(content: bytes, block: int) -> bytes:
    """Return the graph with blocks of ``block`` channels where that is faster.

    ``content`` is a serialized model that has passed the gate.  It is returned as it is if no node
    of it can run so, or if ``block`` is 0.
    """
    return block_placed(PlacedGraph(content), block) if block else content


def block_placed(graph: PlacedGraph, block: int) -> bytes:
    """Return what :func:`block_convolutions` returns, for a graph that has been read."""
    if not block:
        return graph.content
    chosen = {node.place for node in graph.nodes if can_block(node, graph.shapes, block)}
    return _Writer(graph, block).write(chosen) if chosen else graph.content


def can_block(node: PlacedNode, shapes: dict[str, Shape], block: int) -> bool:
    """Return whether a node is a convolution that runs in blocks of ``block`` channels.

    Its image must be declared with the channels that the weights have: the kernel would take
    missing ones for zeros.  With negative padding the kernel writes beyond its output.
    """
    if node.operator != "Conv" or node.domain or len(node.results) != 1:
        return False
    image, shape = shapes.get(node.argument(0), ()), shapes.get(node.argument(1), ())
    if len(image) != 4 or len(shape) != 4:
        return False
    outputs, inputs, *kernel = shape
    groups = _count_groups(node)
    if outputs is None or inputs is None or outputs % block or image[1] != inputs * groups:
        return False
    if min(node.integers.get("pads", ()), default=0) < 0:
        return False
    if groups > 1:
        return groups == outputs and inputs == 1
    if None in kernel or kernel == [1, 1]:  # a product of matrices, for which blocks gain nothing
        return False
    return inputs < block or (inputs % block == 0 and inputs < WIDE)


def _count_groups(node: PlacedNode) -> int:
    return next(iter(node.integers.get("group", ())), 1)


def _find_prefix(graph: PlacedGraph) -> str:
    """Return a prefix that no name of the graph has."""
    names = [*graph.uses, *graph.shapes, *graph.constants, *graph.inputs]
    names += [name for node in graph.nodes for name in (*node.results, node.name)]
    prefix = "splitonnx.blocked"
    while any(name.startswith(prefix) for name in names):
        prefix += "_"
    return prefix


class _Writer:
    """The rewritten graph's fields, in the order of the graph that was given."""

    def __init__(self, graph: PlacedGraph, block: int) -> None:
        self._graph = graph
        self._block = block
        self._makers = {name: node for node in graph.nodes for name in node.results if name}
        self._uses = Counter(graph.uses)
        self._nodes: list[tuple[PlacedNode | None, bytes]] = []
        self._constants: dict[tuple[int, ...], str] = {}
        self._prefix = _find_prefix(graph)
        self._made: dict[tuple[str, tuple[str, ...], tuple[bytes, ...]], str] = {}

    def write(self, chosen: set[tuple[int, int]]) -> bytes:
        """Return the whole model, where the nodes at the places ``chosen`` are blocked."""
        graph, content = self._graph, self._graph.content
        for node in graph.nodes:
            if node.place in chosen:
                self._block_convolution(node)
            else:
                start, stop = node.place
                self._nodes.append((node, content[start:stop]))
        fields = [(name, content[a:b]) for name, a, b in graph.fields if name != "node"]
        fields += [("node", written) for written in self._list_used()]
        made = [write_constant(name, numbers) for numbers, name in self._constants.items()]
        fields += [("initializer", constant) for constant in made]
        opsets = [content[start:stop] for start, stop in graph.opsets] + [write_opset(DOMAIN, 1)]
        return write_model(graph.ir_version, opsets, fields)

    def _list_used(self) -> list[bytes]:
        """Leave out what only rearranged values for nodes that are blocked now."""
        if self._graph.has_bodies:
            return [written for _, written in self._nodes]
        kept = []
        for node, written in reversed(self._nodes):
            moves = node is not None and node.operator in _MOVES
            if node is not None and moves and not any(self._uses[name] for name in node.results):
                self._uses.subtract(node.arguments)
                continue
            kept.append(written)
        return kept[::-1]

    def _block_convolution(self, node: PlacedNode) -> None:
        content = self._graph.content
        image, weights, *bias = node.arguments
        outputs, inputs, *kernel = self._graph.shapes[weights]
        assert outputs is not None
        assert inputs is not None
        if _count_groups(node) > 1:
            image = self._reorder(image)
            arranged = self._arrange_channels(weights, outputs)
        else:
            if inputs >= self._block:
                image = self._reorder(image)
            points = [extent for extent in kernel if extent is not None]
            arranged = self._arrange(weights, [outputs, inputs, *points])
        convolved = self._add(
            "Conv",
            [image, arranged, *bias],
            label=node.name,
            domain=DOMAIN,
            attributes=[content[start:stop] for start, stop in node.attributes],
        )
        channels = write_attribute("channels", outputs)
        output = write_node(
            "ReorderOutput", [convolved], node.results[0], domain=DOMAIN, attributes=[channels]
        )
        self._nodes.append((None, output))
        self._uses.subtract(node.arguments)

    def _arrange_channels(self, weights: str, channels: int) -> str:
        """Bring depthwise weights into the kernel's order, which is that of an image."""
        if self._find_stacked(weights) is not None:
            return self._reorder(weights)
        image = self._reshape(weights, [1, channels, 0, 0])
        return self._reshape(self._reorder(image), [channels, 1, 0, 0])

    def _arrange(self, weights: str, shape: Sequence[int]) -> str:
        """Bring weights into the order in which the kernel reads them."""
        block, (outputs, inputs, *kernel) = self._block, shape
        points = kernel[0] * kernel[1]
        source = self._find_mirrored(weights)
        if inputs < block:
            value = self._swap(weights, [outputs // block, block, inputs * points])
        elif source is None or outputs % block:
            value = self._swap(self._reorder(weights), [outputs // block, block, inputs * points])
        else:  # [inputs, outputs, ...], mirrored: blocks change places, and points within them
            split = [inputs // block, block, outputs // block, points, block]
            value = self._reshape(self._reorder(source), split)
            order = [write_attribute("perm", [2, 0, 3, 1, 4])]
            value = self._add("Transpose", [value], attributes=order)
            backwards = self._hold(list(range(points - 1, -1, -1)))
            axis = [write_attribute("axis", 2)]
            value = self._add("Gather", [value, backwards], attributes=axis)
        return self._reshape(value, shape)

    def _swap(self, value: str, split: Sequence[int]) -> str:
        """Exchange the last two of three axes."""
        order = [write_attribute("perm", [0, 2, 1])]
        return self._add("Transpose", [self._reshape(value, split)], attributes=order)

    def _find_mirrored(self, weights: str) -> str | None:
        """Return the weights of which these are the mirror image, with inputs for outputs.

        That is how the gradient of a convolution's input has them.
        """
        turned = self._makers.get(weights)
        if turned is None or turned.integers.get("perm") != (1, 0, 2, 3):
            return None
        cut = self._makers.get(turned.argument(0))
        if cut is None or cut.operator != "Slice" or len(cut.arguments) != 5:
            return None
        outputs, inputs, *kernel = self._graph.shapes[weights]
        if self._graph.shapes.get(cut.argument(0)) != (inputs, outputs, *kernel):
            return None  # a part of them
        read = [self._graph.constants.get(name) for name in cut.arguments[1:]]
        points = max(extent or 0 for extent in kernel)
        reaches_start = read[1] is not None and max(read[1], default=0) < -points
        is_mirrored = read[0] == read[3] == (-1, -1) and read[2] == (2, 3) and reaches_start
        return cut.argument(0) if is_mirrored else None

    def _reorder(self, value: str) -> str:
        """Bring an image into blocks, before images are stacked where they are."""
        source = self._find_stacked(value)
        if source is None:
            return self._add("ReorderInput", [value], domain=DOMAIN)
        outputs, inputs, _, columns = [extent or -1 for extent in self._graph.shapes[value]]
        blocks = outputs * inputs // self._block
        split = self._reshape(self._reorder(source), [0, blocks, -1])
        order = [write_attribute("perm", [1, 0, 2])]
        turned = self._add("Transpose", [split], attributes=order)
        return self._reshape(turned, [outputs, inputs, -1, columns])

    def _find_stacked(self, value: str) -> str | None:
        """Find the images [N, C, H, W] that a value has below each other, as [1, C, N * H, W].

        It may also have them as [C, 1, N * H, W].
        """
        stacked, shapes = self._makers.get(value), self._graph.shapes
        if stacked is None or stacked.operator != "Reshape":
            return None
        turned = self._makers.get(stacked.argument(0))
        if turned is None or turned.integers.get("perm") != (1, 0, 2, 3):
            return None
        target = self._graph.constants.get(stacked.argument(1), ())
        channels, *_, columns = shapes.get(stacked.argument(0)) or (None, None)
        if channels is None or columns is None:
            return None
        wanted = ((1, channels, -1, columns), (channels, 1, -1, columns))
        return turned.argument(0) if target in wanted else None

    def _reshape(self, value: str, shape: Sequence[int]) -> str:
        return self._add("Reshape", [value, self._hold(shape)])

    def _hold(self, numbers: Sequence[int]) -> str:
        return self._constants.setdefault(
            tuple(numbers), f"{self._prefix}/constants/{len(self._constants)}"
        )

    def _add(
        self,
        operator: str,
        arguments: Sequence[str],
        *,
        label: str = "",
        domain: str = "",
        attributes: Sequence[bytes] = (),
    ) -> str:
        """Add a node, unless an equal one is there already, and return its output."""
        key = (operator, tuple(arguments), tuple(attributes))
        if key not in self._made:
            self._made[key] = result = f"{self._prefix}/{len(self._made)}"
            self._uses.update(arguments)
            written = write_node(
                operator, arguments, result, name=label, domain=domain, attributes=attributes
            )
            self._nodes.append((None, written))
        return self._made[key]
