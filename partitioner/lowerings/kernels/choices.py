"""Choose the kernels of a joint graph, before it is cut into stages."""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.graphs.traversals import list_bodies
from splitonnx.partitioner.inference.node_faults import attribute_errors_to
from splitonnx.partitioner.lowerings.kernels.clip_gradients import compare_with_output
from splitonnx.partitioner.lowerings.kernels.convolution_gradients import separate_input_gradient
from splitonnx.partitioner.lowerings.kernels.depthwise_gradients import stack_images
from splitonnx.partitioner.lowerings.kernels.relu_gradients import multiply_by_slope
from splitonnx.partitioner.lowerings.kernels.scalars import fit_scalars
from splitonnx.partitioner.lowerings.kernels.turned_products import (
    read_turned,
    turn_first,
    write_turned,
)

_CHOICES = {
    "ConvGrad": (separate_input_gradient, stack_images),
    "FusedMatMul": (read_turned,),
    "MatMul": (read_turned,),
    "ReluGrad": (multiply_by_slope,),
    "Transpose": (write_turned,),
}


def choose_kernels(graph: ir.Graph) -> None:
    """Replace, in place, the nodes of a graph and of its bodies by forms that are faster.

    Call this function after differentiation.  The values that replace others keep their names.
    """
    clips: set[ir.Node] = set()  # those that come before the node
    for node in list(graph):
        for body in list_bodies(node):
            choose_kernels(body)
        with attribute_errors_to(node, "given a faster kernel", is_valid=True):
            fit_scalars(node)
            for choose in _CHOICES.get(node.op_type, ()):
                choose(node)
            if node.op_type == "Clip":
                clips.add(node)
            elif node.op_type == "And":
                compare_with_output(node, clips)
    for node in list(graph):  # after those that have a product transpose its matrices
        if node.op_type == "Gemm" and not node.domain:
            with attribute_errors_to(node, "given a faster kernel", is_valid=True):
                turn_first(node)
