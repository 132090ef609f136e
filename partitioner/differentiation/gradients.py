"""Differentiate a model with onnxruntime-training, which is called through :mod:`natives`.

This module does not depend on cuts.  Ports, the Identity nodes that mark where the parties exchange
tensors, are treated like any other Identity node.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from splitonnx.partitioner.differentiation.control_flow.forward import supply_gradients
from splitonnx.partitioner.differentiation.control_flow.obstacles import list_undifferentiable
from splitonnx.partitioner.differentiation.derived.derivations import add_gradients


def differentiate(model: ir.Model, parameters: Sequence[str], loss: str) -> ir.Model:
    """Return the joint graph: ``model`` extended by the gradients of ``loss``.

    The parameters must be graph inputs.  For each parameter, the result has an additional output
    ``<name>_grad``.  The result may contain ONNX Runtime's own operators: training-mode
    BatchNormalization becomes BatchNormInternal, and some patterns (GELU, LayerNormalization) are
    fused into one node.

    Raises:
        NotDifferentiable: an operator has no gradient.
        UnsupportedModel: the builder refuses the model for another reason.
        MissingExtra, WrongRuntime: onnxruntime-training is not installed.
    """
    for fault in list_undifferentiable(model.graph, parameters, [loss]):
        raise fault
    supplied = supply_gradients(model, parameters, [loss])
    derived = add_gradients(model, parameters, [], supplied, loss=loss)
    _compute_constant_outputs(derived.graph)
    return derived


def _compute_constant_outputs(graph: ir.Graph) -> None:
    """Add a node for each output that is a constant, so that a stage can compute it.

    ONNX Runtime's optimizer evaluates nodes that depend on nothing, such as what replaces a state
    with a size that is fixed.
    """
    for index, value in enumerate(graph.outputs):
        if not value.is_initializer():
            continue
        name = value.name or ""
        graph.initializers.pop(name)
        value.name = f"{name}/constant"
        graph.register_initializer(value)
        node = ir.node("Identity", [value], name=name)
        made = node.outputs[0]
        made.name, made.type, made.shape = name, value.type, value.shape
        graph.append(node)
        graph.outputs[index] = made
