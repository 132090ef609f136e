"""Write the graphs of a stage whose regions run tile by tile: one for each region, and the rest.

Values of a region are renamed by the order in which they appear, so that the graphs of equal
regions, as are those of most parameters, have the same bytes and can share a session.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph
from splitonnx.runtime.engine.layouts.messages import write_model, write_node, write_value
from splitonnx.runtime.engine.tiles.regions import Region


def name_array(index: int) -> str:
    """Return the name, in a program, of a region's array at this place."""
    return f"x{index}"


def name_scalar(index: int) -> str:
    """Return the same for a scalar."""
    return f"s{index}"


def name_output(index: int) -> str:
    """Return the same for an output."""
    return f"y{index}"


def write_program(graph: PlacedGraph, region: Region) -> bytes:
    """Return a model that computes a region for tensors of any one shape and its scalars.

    All scalars are inputs, also those that are constants in the graph.
    """
    outputs = {name: name_output(index) for index, name in enumerate(region.outputs)}
    inputs = {name: name_array(index) for index, name in enumerate(region.arrays)}
    inputs |= {name: name_scalar(index) for index, name in enumerate(region.scalars)}
    names = {**inputs, **outputs}
    for node in region.nodes:
        names.setdefault(node.results[0], f"t{len(names)}")
    nodes = [
        write_node(node.operator, [names[name] for name in node.arguments], names[node.results[0]])
        for node in region.nodes
    ]
    fields = [("node", node) for node in nodes]
    fields.append(("name", b"tile"))
    fields += [("input", write_value(name, None)) for name in inputs.values()]
    fields += [("output", write_value(name, None)) for name in outputs.values()]
    return _write_model(graph, fields)


def list_rest(graph: PlacedGraph, regions: Sequence[Region]) -> tuple[str, ...]:
    """List the outputs of what is left of a graph: those of its own, then the regions' scalars."""
    made = {name for region in regions for name in region.outputs}
    scalars = (name for region in regions for name in region.scalars)
    own = [name for name in graph.outputs if name not in made]
    given = {*graph.inputs}
    return tuple(dict.fromkeys([*own, *(name for name in scalars if name not in given)]))


def write_rest(
    graph: PlacedGraph, regions: Sequence[Region], dropped: Collection[str] = ()
) -> bytes:
    """Return the model without its regions' nodes, which has the outputs of :func:`list_rest`.

    The inputs ``dropped``, which only the regions read, are left out.
    """
    content = graph.content
    left_out = {node.place for region in regions for node in region.nodes}
    wanted = list_rest(graph, regions)
    fields: list[tuple[str, bytes]] = []
    labels, inputs = iter(graph.outputs), iter(graph.inputs)
    for name, start, stop in graph.fields:
        # declared shapes stay, as onnxruntime-training crashes on some nodes without them
        is_dropped = name == "node" and (start, stop) in left_out
        is_dropped |= name == "input" and next(inputs) in dropped
        if is_dropped or (name == "output" and next(labels) not in wanted):
            continue
        fields.append((name, content[start:stop]))
    declared = {*graph.outputs}
    fields += [("output", write_value(name, None)) for name in wanted if name not in declared]
    return _write_model(graph, fields)


def _write_model(graph: PlacedGraph, fields: Iterable[tuple[str, bytes]]) -> bytes:
    opsets = [graph.content[start:stop] for start, stop in graph.opsets]
    return write_model(graph.ir_version, opsets, fields)
