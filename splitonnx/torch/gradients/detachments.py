"""Make ``cut`` stop the same gradients as ``detach`` and the padding of Embeddings in PyTorch.

Both change only gradients, not results, so exporters do not write them as needed.

While the legacy exporter runs, each ``detach`` is written as a custom node.  Afterwards, an
Identity replaces this node.  The name of the Identity's output can be passed to ``cut`` in
``stop_gradients``.  The dynamo exporter writes such an Identity without help.

The row of an Embedding for ``padding_idx`` gets no gradient from lookups.  Neither exporter writes
this.  Therefore nodes are added to the model after the export, among them an Identity at which
gradients can be stopped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from splitonnx.partitioner.gate.walks import list_nodes
from splitonnx.torch.networks import Layout

_DOMAIN, _OPERATOR = "splitonnx.torch", "Detach"
_SYMBOL = "aten::detach"
_DYNAMO = re.compile(r"detach(_\d+)?")
"""The names that the dynamo exporter gives to the results of ``detach``."""


@contextmanager
def writing_detachments(torch: Any, opset: int) -> Iterator[list[str]]:
    """Within a ``with`` block, make the legacy exporter write each ``detach`` as a node.

    The block receives a list, which has one entry for each node that has been written.  No node is
    written for a ``detach`` of a constant.
    """
    written: list[str] = []

    def write(graph: Any, value: Any) -> Any:
        if value.node().kind().endswith("::Constant"):  # which the exporter may have to read
            return value
        written.append(value.debugName())
        return graph.op(f"{_DOMAIN}::{_OPERATOR}", value).setType(value.type())

    torch.onnx.register_custom_op_symbolic(_SYMBOL, write, opset)
    try:
        yield written
    finally:
        torch.onnx.unregister_custom_op_symbolic(_SYMBOL, opset)


def replace_detachments(model: onnx.ModelProto) -> tuple[str, ...]:
    """Replace the nodes for ``detach`` by Identity nodes, and return the names of their outputs.

    The model is changed in place.  Nodes in the bodies of control flow are also replaced, but only
    names from the main graph are returned, in the graph's order.
    """
    for node in list_nodes(model.graph.node):
        if (node.domain, node.op_type) == (_DOMAIN, _OPERATOR):
            node.domain, node.op_type = "", "Identity"
            node.doc_string = _SYMBOL
    for imported in list(model.opset_import):
        if imported.domain == _DOMAIN:
            model.opset_import.remove(imported)
    return tuple(node.output[0] for node in model.graph.node if _is_detachment(node))


def _is_detachment(node: onnx.NodeProto) -> bool:
    if node.op_type != "Identity" or node.domain:
        return False
    return node.doc_string == _SYMBOL or bool(_DYNAMO.fullmatch(node.output[0]))


def find_paddings(torch: Any, network: Any, layout: Layout) -> dict[str, int]:
    """Return the ``padding_idx`` of each Embedding that has one, by the name of its weight.

    A tied weight is listed under all of its names.
    """
    own = {
        f"{name}.weight" if name else "weight": int(module.padding_idx)
        for name, module in network.named_modules(remove_duplicate=False)
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None
    }
    return {other: at for name, at in own.items() for other in layout.groups.get(name, (name,))}


def stop_paddings(model: onnx.ModelProto, paddings: Mapping[str, int]) -> tuple[str, ...]:
    """Add nodes to the model so that gradients can be stopped at the padding of Embeddings.

    ``paddings`` maps the name of an Embedding's weight to its ``padding_idx``.  Return the names of
    the tensors at which gradients must be stopped.  The model is changed in place, but its results
    stay the same: the output ``y`` of a lookup becomes
    ``Where(indices == padding_idx, Identity(y), y)``.
    """
    graph = model.graph
    stops = []
    for node in [n for n in graph.node if n.op_type == "Gather" and n.input[0] in paddings]:
        if any(attribute.name == "axis" and attribute.i for attribute in node.attribute):
            continue
        (name,) = node.output
        rows, stop, index = f"{name}.rows", f"{name}.padding", f"{name}.padding_index"
        node.output[0] = rows
        padding = numpy_helper.from_array(np.array(paddings[node.input[0]], np.int64), index)
        last = numpy_helper.from_array(np.array([-1], np.int64), f"{name}.last_axis")
        graph.initializer.extend([padding, last])
        added = [
            helper.make_node("Identity", [rows], [stop]),
            helper.make_node("Cast", [node.input[1]], [f"{name}.indices"], to=padding.data_type),
            helper.make_node("Equal", [f"{name}.indices", index], [f"{name}.is_padding"]),
            helper.make_node("Unsqueeze", [f"{name}.is_padding", last.name], [f"{name}.mask"]),
            helper.make_node("Where", [f"{name}.mask", stop, rows], [name]),
        ]
        at = list(graph.node).index(node) + 1
        for offset, one in enumerate(added):
            graph.node.insert(at + offset, one)
        stops.append(stop)
    return tuple(stops)
