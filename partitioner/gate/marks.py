"""Remove from a model's nodes and values the marks that this package uses for itself.

Passes mark nodes and values in their metadata, for example those through which no gradient passes.
A file that brings such a mark along would be trained in another way than its graph says.  Entries
for the model as a whole (:mod:`stored_options`, :mod:`adapters`) are no marks: they are documented,
and what they change is told.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping

import onnx_ir as ir

from splitonnx.partitioner.graphs.traversals import list_bodies

_PREFIX = "splitonnx."


def forget_marks(model: ir.Model) -> None:
    """Remove the metadata entries named ``splitonnx.*`` from all nodes, values and graphs."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for metadata in _list_metadata(graph):
            for key in [key for key in metadata if key.startswith(_PREFIX)]:
                del metadata[key]


def _list_metadata(graph: ir.Graph) -> Iterator[MutableMapping[str, str]]:
    yield graph.metadata_props
    yield from (value.metadata_props for value in graph.inputs)
    yield from (value.metadata_props for value in graph.initializers.values())
    for node in graph:
        yield node.metadata_props
        yield from (value.metadata_props for value in node.outputs)
        for body in list_bodies(node):
            yield from _list_metadata(body)
