"""Set the node names, modes, outputs and float weights of a model and of its two forms."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.cutting.passes.work import Work
from splitonnx.partitioner.graphs.traversals import find_dependents, list_bodies, list_nodes
from splitonnx.partitioner.normalization.batchnorms import (
    list_batchnorms,
    use_running_statistics,
)
from splitonnx.partitioner.normalization.dequantized.replacements import dequantize
from splitonnx.partitioner.normalization.dropouts import remove_dropouts
from splitonnx.partitioner.normalization.explicit_operands import separate_broadcast_scales
from splitonnx.partitioner.normalization.quantizations import lift_quantized


def make_inference_form(graph: ir.Graph) -> None:
    """Turn a graph into its inference form, in place.

    BatchNormalization then uses running statistics, Dropout is removed, and a LayerNormalization
    has the scale and the bias that ONNX Runtime takes; that of the training form is rewritten.
    """
    use_running_statistics(graph)
    remove_dropouts(graph)
    separate_broadcast_scales(graph)


def keep_data_outputs(graph: ir.Graph, weights: Collection[str]) -> None:
    """Remove the graph outputs that do not depend on the model's data, in place.

    Running statistics and string outputs are also removed.  ``weights`` names the graph inputs that
    are not data.
    """
    data = find_dependents(graph, [value for value in graph.inputs if value.name not in weights])
    statistics = {value for node in list_batchnorms(graph) for value in node.outputs[1:]}
    lost = {value for value in graph.outputs if value.dtype == ir.DataType.STRING} | statistics
    kept = [value for value in graph.outputs if value in data and value not in lost]
    graph.outputs.clear()
    graph.outputs.extend(kept)


def name_nodes(graph: ir.Graph) -> None:
    """Make sure that every node has a unique name, also in subgraph bodies.

    A node without a name is named after its first output, because this name is in the user's model.
    Error messages and cuts refer to nodes by name, and random numbers depend on the names.
    """
    given = {node.name for node in graph if node.name}
    taken: set[str] = set()
    for index, node in enumerate(graph):
        if not node.name or node.name in taken:
            named = (value.name for value in node.outputs if value.name)
            node.name = next(named, f"{node.op_type}_{index}")
            while node.name in given or node.name in taken:
                node.name += "_"
        taken.add(node.name)
        for body in list_bodies(node):
            name_nodes(body)


def name_outputs(graph: ir.Graph) -> None:
    """Name each unnamed output of a node with subgraph bodies, in place.

    Nobody reads such an output, but ONNX Runtime needs its name: it refuses the node, or a loop
    that carries the output ends the whole process.  Nodes in bodies are treated too.
    """
    nodes = list_nodes(graph)
    taken = {value.name for node in nodes for value in (*node.inputs, *node.outputs) if value}
    for each in (graph, *(body for node in nodes for body in list_bodies(node))):
        taken |= {value.name for value in (*each.inputs, *each.initializers.values())}
    for node in nodes:
        if not list_bodies(node):
            continue
        for index, value in enumerate(node.outputs):
            if not value.name:
                value.name = f"{node.name}/unused/{index}"
                while value.name in taken:
                    value.name += "_"
                taken.add(value.name)


def refuse_unkept_statistics(statistics: Collection[str], weights: Collection[str]) -> None:
    """Check that all running statistics updated by training are weights of the model.

    Raises:
        UnsupportedModel: a running statistic is computed in the graph, so it cannot be updated.
    """
    for name in statistics:
        if name not in weights:
            raise UnsupportedModel(
                f"running statistic '{name}' of a BatchNormalization",
                "it is computed in the graph, so it cannot be updated",
                "train with --batchnorm frozen",
            )


def lift_integers(work: Work) -> None:
    """Replace the integer weights of a model with float weights, in place.

    Integer arithmetic is replaced only if the user asked for it.  Tensors that then have the names
    of the float model again count as tensors of the user's model.

    Raises:
        UnsupportedModel: an operator cannot be replaced.
        UsageError: the user asked for it, but the model does not compute with integers.
    """
    if work.dequantize:
        work.dequantized = dequantize(work.model)
        work.given |= work.dequantized.chosen
    lift_quantized(work.model.graph)
