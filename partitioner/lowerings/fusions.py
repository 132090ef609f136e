"""Prevent ONNX Runtime's optimizer from merging nodes if the result would be wrong.

The optimizer's rule PadFusion adds the widths of a Pad to the ``pads`` of the pooling node after
it.  The results are then wrong, because elements added by a Pad count in an average and can be the
largest of a window, but elements added by ``pads`` never count.  ONNX Runtime 1.19.2 silently
computes wrong results for AveragePool and MaxPool, and version 1.30 does so for MaxPool.  The Pad
need not be adjacent to the pooling node at first, because other rules remove operators that have no
effect, and move transposes.

A Pad that lists its axes explicitly computes the same values, but PadFusion does not apply to it.

The rules that merge a Transpose into a MatMul or Gemm assume that a Transpose of a matrix swaps its
two axes.  If a Transpose leaves the axes in their order, ONNX Runtime 1.19.2 computes wrong results
at the optimization level BASIC and above.  An Identity computes the same values as this Transpose,
and the optimizer removes an Identity correctly.

This module handles these rules.  :mod:`layer_norm_fusions`, :mod:`product_fusions` and
:mod:`integer_kernels` handle others.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import NodeBuilder, known_array
from splitonnx.partitioner.graphs.traversals import list_bodies
from splitonnx.partitioner.inference.node_faults import attribute_errors_to
from splitonnx.partitioner.lowerings.integer_kernels import (
    separate_pairs,
    use_unsigned_integers,
)
from splitonnx.partitioner.lowerings.layer_norm_fusions import separate_layer_norms
from splitonnx.partitioner.lowerings.product_fusions import separate_products


def prevent_wrong_fusions(graph: ir.Graph, *, is_valid: bool = False) -> None:
    """Rewrite, in place, all nodes that ONNX Runtime would merge or compute wrongly.

    ``is_valid`` means that all nodes are known to be valid for their operators.  If an operator is
    then handled wrongly, the error reports a bug in splitonnx, not an invalid model.
    """
    separate_pads(graph, is_valid=is_valid)
    replace_null_transposes(graph)
    separate_layer_norms(graph)
    separate_products(graph)
    separate_pairs(graph)
    use_unsigned_integers(graph)


def separate_pads(graph: ir.Graph, *, is_valid: bool = False) -> None:
    """Keep ONNX Runtime from merging Pad nodes into pooling nodes.

    ONNX Runtime does not merge a Pad that lists its axes, so all axes are listed explicitly.  The
    graph and its subgraph bodies are changed in place.  A Pad whose output is read only by
    convolutions is left unchanged, because merging it into a convolution is correct and saves a
    copy.
    """
    for node in list(graph):
        for body in list_bodies(node):
            separate_pads(body, is_valid=is_valid)
        if node.op_type == "Pad" and not node.domain and _names_no_axes(node):
            with attribute_errors_to(node, "kept from a wrong fusion", is_valid=is_valid):
                _separate_pad(node)


def _separate_pad(node: ir.Node) -> None:
    widths = known_array(node.inputs[1])
    if widths is not None and not _feeds_convolutions_alone(node):
        _name_axes(node, len(widths) // 2)


def _names_no_axes(node: ir.Node) -> bool:
    return len(node.inputs) < 4 or node.inputs[3] is None


def _feeds_convolutions_alone(node: ir.Node) -> bool:
    readers = node.outputs[0].consumers()
    return all(reader.op_type == "Conv" and not reader.domain for reader in readers)


def _name_axes(node: ir.Node, rank: int) -> None:
    graph = node.graph
    assert graph is not None
    builder = NodeBuilder(f"{node.outputs[0].name}/axes")
    axes = builder.integers(list(range(rank)))
    graph.insert_before(node, builder.nodes)
    node.resize_inputs(4)
    node.replace_input_with(3, axes)


def replace_null_transposes(graph: ir.Graph) -> None:
    """Replace, in place, each Transpose that leaves the axes in their order with an Identity.

    Nodes in the subgraph bodies of control-flow nodes are replaced as well.
    """
    for node in list(graph):
        for body in list_bodies(node):
            replace_null_transposes(body)
        if node.op_type == "Transpose" and not node.domain and _permutes_nothing(node):
            node.op_type = "Identity"
            node.attributes.pop("perm", None)


def _permutes_nothing(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm")
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if permutation is None:
        return shape is not None and len(shape) <= 1
    axes = list(permutation.as_ints())  # one that does not fit the tensor is left to be refused
    return axes == list(range(len(axes))) and shape is not None and len(shape) == len(axes)
