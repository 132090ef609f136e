"""Replace each If by one of its branches if it only tests whether the batch size is 1.

Exporters write such an If where the author's code reads the batch size.  Gradients cannot pass
through an If, so it is replaced by its branch for two or more samples.  A batch of one sample would
need the other branch, so it is refused.  The parties refuse it because the batch size is declared
as ``N_less_1 + 1``, in which every name stands for a size of at least 1.  The merged model refuses
it with an assertion.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import onnx_ir as ir

from splitonnx.errors import quote
from splitonnx.expressions import LESS_1
from splitonnx.partitioner.graphs.assertions import pass_if, refuse_where
from splitonnx.partitioner.graphs.builders import MissingOutput, NodeBuilder
from splitonnx.partitioner.graphs.traversals import find_dependents
from splitonnx.partitioner.inference.control_flows import Unresolved, resolve_control_flow
from splitonnx.partitioner.inference.inferences import Inference

_REFUSED = "batch_of_1_refused"


def decide_by_batch(graph: ir.Graph, weights: Collection[str]) -> list[str]:
    """Replace each If by its branch for larger batches if it only tests for a batch size of 1.

    ``weights`` names the graph inputs that are not data.  Return the names of the replaced nodes.
    If there are any, the shapes of all tensors that depend on the data are cleared and have to be
    inferred again.
    """
    raw = [value for value in graph.inputs if value.name not in weights]
    symbols = {name for value in raw if (name := _read_batch(value))}
    if len(symbols) != 1 or not any(_is_if(node) for node in graph):
        return []
    (symbol,) = symbols
    _decide(graph, raw, symbol, f"{symbol} + 1")  # whatever the batch is
    names = _decide(graph, raw, symbol, f"{symbol} + 2")
    if names:
        _declare(raw, symbol, f"{symbol}{LESS_1} + 1")
        for value in find_dependents(graph, raw) - set(raw):
            value.shape = None
    return names


def _decide(graph: ir.Graph, raw: Sequence[ir.Value], symbol: str, size: str) -> list[str]:
    """Replace each If whose condition is known for a batch of this size, and return their names."""
    with _declared(raw, symbol, size):
        known = Inference(graph.opset_imports[""])
        for node in graph:
            known.visit(node)
        asked = [node for node in graph if _is_if(node)]
        found = [node for node in asked if known.constant(node.inputs[0]) is not None]
        return [node.name or "" for node in found if _inline(node, known)]


def describe_decided(nodes: Sequence[str]) -> str:
    """Return a sentence about the replaced If nodes, or an empty string if there are none."""
    if not nodes:
        return ""
    return (
        f"{quote(nodes)} (If) asks whether the batch is 1, and is decided for 2 samples or more; a "
        "batch of 1 is refused, also by the merged model; --dim decides for one size of it"
    )


def refuse_batch_of_1(graph: ir.Graph, weights: Collection[str]) -> None:
    """Change a model in place so that it fails immediately if it is run with a batch of 1.

    ``weights`` names the graph inputs that are not data.
    """
    raw = [value for value in graph.inputs if value.name not in weights]
    source = next(value for value in raw if LESS_1 in _read_batch(value))
    uses = list(source.uses())
    builder = NodeBuilder(_REFUSED)
    rows = builder.op("Shape", source, start=0, end=1)
    zero = refuse_where(builder, builder.op("Less", rows, builder.integers([2])))
    checked = pass_if(builder, source, zero)
    for use in uses:
        use.node.replace_input_with(use.idx, checked)
    first = graph[0]
    graph.insert_before(first, builder.nodes)


def _is_if(node: ir.Node) -> bool:
    return node.op_type == "If" and not node.domain


def _read_batch(value: ir.Value) -> str:
    """Return the name of an input's first dimension, or an empty string if it has none."""
    dim = value.shape[0] if value.shape else 0
    return "" if isinstance(dim, int) else dim.value or ""


def _inline(node: ir.Node, known: Inference) -> bool:
    try:
        resolve_control_flow(node, known, 0)
    except (MissingOutput, Unresolved):  # a later pass refuses a branch that gives nothing
        return False
    return True


@contextmanager
def _declared(raw: Sequence[ir.Value], symbol: str, size: str) -> Iterator[None]:
    """Declare another batch size during a ``with`` block."""
    shapes = [value.shape for value in raw]
    _declare(raw, symbol, size)
    try:
        yield
    finally:
        for value, shape in zip(raw, shapes, strict=True):
            value.shape = shape


def _declare(raw: Sequence[ir.Value], symbol: str, size: str) -> None:
    for value in raw:
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            value.shape = ir.Shape([size if dim == symbol else dim for dim in dims])
