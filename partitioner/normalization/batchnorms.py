"""Set BatchNormalization to its training, frozen or inference form.

The gradient builder of onnxruntime-training 1.19.2 sets every BatchNormalization to training mode,
even if the node should be frozen.  Therefore a frozen BatchNormalization is replaced by its
formula.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.graphs.builders import NodeBuilder
from splitonnx.partitioner.graphs.faults import attribute_errors_to

NEXT = "#next"


def list_batchnorms(graph: ir.Graph) -> list[ir.Node]:
    """List the BatchNormalization nodes of a graph in graph order."""
    return [node for node in graph if node.op_type == "BatchNormalization" and not node.domain]


def is_training(node: ir.Node) -> bool:
    """Return whether a BatchNormalization node normalises with the statistics of the batch."""
    return node.attributes.get_int("training_mode", 0) == 1


def train_batchnorms(graph: ir.Graph, *, mode: str | None) -> dict[str, str]:
    """Set the mode of every BatchNormalization, and return how running statistics are updated.

    ``mode`` is ``"train"``, ``"frozen"``, or ``None`` to keep the mode of each node.  If training
    updates a running statistic, the result maps its name to the name of the graph value that
    replaces it after each step.

    Raises:
        UnsupportedModel: two nodes share a running statistic.
    """
    successors: dict[str, str] = {}
    for node in list_batchnorms(graph):
        training = is_training(node) if mode is None else mode == "train"
        node.attributes["training_mode"] = ir.AttrInt64("training_mode", int(training))
        if not training:
            continue
        with attribute_errors_to(node, "given running statistics"):
            if len(node.outputs) < 3:
                node.resize_outputs(3)
            for statistic, output in zip(node.inputs[3:5], node.outputs[1:3], strict=True):
                assert statistic is not None
                if statistic.name in successors:
                    raise UnsupportedModel(
                        f"node '{node.name}' (BatchNormalization)",
                        f"its running statistic '{statistic.name}' belongs to another node as well",
                    )
                output.name = output.name or f"{statistic.name}{NEXT}"
                output.type, output.shape = statistic.type, statistic.shape
                successors[statistic.name or ""] = output.name
    return successors


def freeze_batchnorms(graph: ir.Graph) -> set[str]:
    """Replace each BatchNormalization in inference mode with its formula.

    This is necessary because onnxruntime-training would set the node to training mode.  Return the
    names of the running statistics that the replaced nodes used.
    """
    statistics: set[str] = set()
    for node in list_batchnorms(graph):
        if is_training(node):
            continue
        statistics.update(value.name or "" for value in node.inputs[3:5] if value is not None)
        with attribute_errors_to(node, "written as its formula"):
            _write_out(graph, node)  # removes the node's inputs
    return statistics


def _write_out(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a node by (x - mean) * scale / sqrt(var + epsilon) + bias, computed per channel."""
    x, scale, bias, mean, variance = node.inputs
    assert x is not None
    if x.shape is None:
        raise UnsupportedModel(
            f"node '{node.name}' (BatchNormalization)",
            "the rank of its input is not known",
            "export the model with shapes",
        )
    rank = len(x.shape)
    builder = NodeBuilder(node.name or "")

    def spread(value: ir.Value | None) -> ir.Value | None:
        """Reshape [C] to [C, 1, ...], so that it is broadcast along axis 1."""
        return (
            builder.op("Unsqueeze", value, builder.integers(range(1, rank - 1)))
            if rank > 2
            else value
        )

    epsilon = builder.number(node.attributes.get_float("epsilon", 1e-5), x.dtype)
    deviation = builder.op("Sqrt", builder.op("Add", variance, epsilon))
    factor = builder.op("Div", scale, deviation)
    scaled = builder.op("Mul", builder.op("Sub", x, spread(mean)), spread(factor))
    output = builder.op("Add", scaled, spread(bias))
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], builder.nodes, [node.outputs[0]], [output]
    )


def use_running_statistics(graph: ir.Graph) -> None:
    """Set every BatchNormalization to inference mode, in which it uses its running statistics.

    If the updated value of a running statistic is used, for example as a model output, the
    statistic itself takes its place.
    """
    for node in list_batchnorms(graph):
        node.attributes["training_mode"] = ir.AttrInt64("training_mode", 0)
        for statistic, output in zip(node.inputs[3:5], node.outputs[1:3], strict=False):
            if output.uses() or output.is_graph_output():
                stand_in = ir.node("Identity", [statistic], name=f"{node.name}/{output.name}")
                stand_in.outputs[0].type, stand_in.outputs[0].shape = output.type, output.shape
                name, output.name = output.name, None
                stand_in.outputs[0].name = name
                ir.convenience.replace_nodes_and_values(
                    graph, node, [], [stand_in], [output], [stand_in.outputs[0]]
                )
        node.resize_outputs(1)
