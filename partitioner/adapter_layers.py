"""Find the weights of a model that can have low-rank adapters, and say why others cannot.

Such a weight is a matrix that is used by nothing but MatMul and Gemm nodes, as their right factor.
If it were used elsewhere as well, such as by an Embedding, an adapter could not be folded into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.adapters import PRODUCTS, find_matrix, read_integer
from splitonnx.partitioner.gate.exporters import find_module
from splitonnx.partitioner.graphs.traversals import reads_size
from splitonnx.partitioner.normalization.parameters import list_uses
from splitonnx.partitioner.normalization.weights import find_matches, list_stored, refuse_unknown


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A weight that can have an adapter.

    ``products`` are all nodes that use it.  ``is_transposed`` means that it is stored as
    (out, in) and not as (in, out).
    """

    tensor: ir.TensorProtocol
    products: Sequence[ir.Node]
    is_transposed: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of inputs and of outputs."""
        first, second = self.tensor.shape.numpy()
        return (second, first) if self.is_transposed else (first, second)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The matrices that patterns find: those that can have adapters, and why others cannot."""

    layers: dict[str, Layer] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def find_layers(graph: ir.Graph, patterns: Sequence[str]) -> Finding:
    """Find the matrices whose own name, or the name of whose product or module, patterns find.

    Raises:
        UnsupportedModel: a pattern finds nothing, or nothing that can have an adapter.
    """
    stored = dict(list_stored(graph))
    calls = _name_products(stored)
    names = {*stored, *(name for called in calls.values() for name in called)}
    finding = Finding()
    for pattern in patterns:
        found = find_matches(pattern, names, "--lora")
        if not found:
            raise refuse_unknown("--lora", pattern, sorted(names))
        chosen = [name for name in stored if name in found or found.intersection(calls[name])]
        fitting, reasons = 0, {}
        for name in chosen:
            layer = examine(*stored[name], graph)
            if not isinstance(layer, str):
                finding.layers[name] = layer
                fitting += 1
            elif layer:
                reasons[name] = layer
        if not fitting:
            name = next(iter(reasons), chosen[0])
            reason = reasons.get(name, "it is not a matrix that a product uses")
            raise UnsupportedModel(f"--lora {pattern}", f"'{name}' can have no adapter: {reason}")
        finding.reasons.update(reasons)
    return finding


def _name_products(
    stored: Mapping[str, tuple[ir.Value, ir.TensorProtocol]],
) -> dict[str, set[str]]:
    """Map each stored tensor to the names of the products that use it, and of their modules."""
    calls: dict[str, set[str]] = {}
    for name, (value, _) in stored.items():
        products = [node for node, _ in list_uses(value) if node.op_type in PRODUCTS]
        modules = [find_module(node) for node in products]
        calls[name] = {text for text in (*(node.name for node in products), *modules) if text}
    return calls


def examine(value: ir.Value, tensor: ir.TensorProtocol, graph: ir.Graph) -> Layer | str:
    """Return how a stored tensor is used, or the reason why it can have no adapter.

    The reason is empty for tensors that nobody takes for the matrix of a layer, such as a bias.
    """
    if len(tensor.shape) < 2:
        return ""
    if not tensor.dtype.is_floating_point():
        return f"it is {tensor.dtype}; adapters need a weight of floats"
    uses = [(node, index) for node, index in list_uses(value) if not reads_size(node)]
    if not uses:
        return ""
    for node, index in uses:
        if reason := _refuse_use(node, index, graph):
            return reason
    if len(tensor.shape) != 2:
        return f"it has {len(tensor.shape)} dimensions; adapters need a matrix"
    if value.is_graph_output():
        return "it is an output of the model"
    products = list(dict.fromkeys(node for node, _ in uses))
    found = {find_matrix(node) for node in products}
    if any(matrix is not value for matrix, _ in found):
        return f"it is cast or reshaped before node '{products[0].name}' uses it"
    if len(found) > 1:
        return "it is used both as it is and transposed"
    return Layer(tensor=tensor, products=products, is_transposed=found.pop()[1])


def _refuse_use(node: ir.Node, index: int, graph: ir.Graph) -> str:
    """Return the reason why a weight that this node uses can have no adapter, or ``""``."""
    kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    if node.domain or node.op_type not in PRODUCTS:
        return f"{kind} uses it; adapters are for weights that only MatMul and Gemm use"
    if node.graph is not graph:
        return f"node '{node.name}' ({kind}), which uses it, is in a branch or loop"
    if index != 1:
        return f"it is input {index} of node '{node.name}' ({kind}); adapters need input 1"
    if node.op_type == "Gemm" and read_integer(node, "transA"):
        return f"node '{node.name}' ({kind}) transposes its other input"
    return ""
