"""Take out of an exported file what an exporter wrote for people: tracebacks, paths, comments."""

from __future__ import annotations

from pathlib import Path

import onnx


def strip(path: Path) -> int:
    """Rewrite the file without texts, and return its size in bytes."""
    model = onnx.load(path)
    del model.metadata_props[:]
    model.doc_string = ""
    _strip_graph(model.graph)
    for function in model.functions:
        del function.metadata_props[:]
        _strip_nodes(function)
    path.write_bytes(model.SerializeToString())
    return path.stat().st_size


def _strip_graph(graph: onnx.GraphProto) -> None:
    del graph.metadata_props[:]
    graph.doc_string = ""
    for entry in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del entry.metadata_props[:]
        entry.doc_string = ""
    _strip_nodes(graph)


def _strip_nodes(holder: onnx.GraphProto | onnx.FunctionProto) -> None:
    for node in holder.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for attribute in node.attribute:
            attribute.doc_string = ""
            if attribute.HasField("g"):
                _strip_graph(attribute.g)
