"""Bring a model into the two forms that the rest works on: one to train, one to predict.

Both forms share every tensor name, so that one cut fits both.  Weights leave the graph and
become graph inputs: what is differentiated stays small, whatever the model weighs.  This module
knows operators' modes in training and inference; it knows no cut, no loss and no gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import RemoveInitializersFromInputsPass

from splitonnx.errors import UnsupportedModel
from splitonnx.manifests import KEY, Role
from splitonnx.partitioner.gate.ml_operators import normalize_ml_operators
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.random_numbers import seed_random_operators
from splitonnx.partitioner.graphs.readings import copy_model
from splitonnx.partitioner.graphs.tables import refuse_tables
from splitonnx.partitioner.graphs.traversals import find_dependents
from splitonnx.partitioner.inference.folds import fold, note_shapes
from splitonnx.partitioner.inference.sequences import flatten_sequences
from splitonnx.partitioner.inference.shapes import check_ranks, infer_shapes
from splitonnx.partitioner.lowerings.fusions import separate_pads
from splitonnx.partitioner.normalization.batchnorms import (
    freeze_batchnorms,
    list_batchnorms,
    train_batchnorms,
    use_running_statistics,
)
from splitonnx.partitioner.normalization.dropouts import remove_dropouts, seed_dropouts
from splitonnx.partitioner.normalization.explicit_padding import make_paddings_explicit
from splitonnx.partitioner.normalization.explicit_reductions import make_reductions_explicit
from splitonnx.partitioner.normalization.opsets import adapt_opset, inline_functions
from splitonnx.partitioner.normalization.precisions import widen
from splitonnx.partitioner.normalization.quantizations import (
    lift_quantized,
    pass_gradients,
    refuse_integer_model,
)
from splitonnx.partitioner.normalization.recurrence_layouts import normalize_layouts
from splitonnx.partitioner.normalization.weights import assign_roles, lift_weights, return_weights
from splitonnx.partitioner.rewrites import rewrite

BatchNormMode = Literal["train", "frozen"]
DropoutMode = Literal["keep", "off"]


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A model in its two forms.

    ``skeleton`` is what both were made from: the model itself, its weights as inputs, with all
    of its outputs; ``training`` and ``inference`` keep those that depend on the model's inputs.
    ``weights`` holds the tensors that became graph inputs, in the model's order, and ``roles``
    what each is.  ``next_buffers`` maps a running statistic to the value in ``training`` that
    replaces it after a step.
    """

    training: ir.Model
    inference: ir.Model
    skeleton: ir.Model
    weights: Mapping[str, ir.TensorProtocol]
    roles: Mapping[str, Role]
    next_buffers: Mapping[str, str]

    @cached_property
    def state(self) -> frozenset[str]:
        """Names of the graph inputs that are not data: the weights, and Dropout's key."""
        return frozenset({*self.weights, KEY})

    @cached_property
    def trainable(self) -> tuple[str, ...]:
        """Names of the trained parameters, in the model's order."""
        return tuple(name for name, role in self.roles.items() if role is Role.PARAMETER)


@attribute_errors_to_pass("prepared for training")
def prepare(
    model: ir.Model,
    *,
    batchnorm: BatchNormMode | None = None,
    dropout: DropoutMode | None = None,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
) -> PreparedModel:
    """Prepare a gated model; ``model`` itself is consumed.

    ``batchnorm`` and ``dropout`` overrule what the model says.  ``train`` and ``freeze`` hold
    regular expressions (``re.search``): what one of ``train`` finds is trained
    (:func:`weights.lift_weights`), what one of ``freeze`` finds keeps its
    value; ``train`` overrules ``freeze``.

    Raises:
        UnsupportedModel: its operators cannot be brought to opset 18 to 21, or a pattern fits
            nothing.
        UsageError: a pattern is not a regular expression or has no effect.
    """
    weights = _normalize(model, train)
    skeleton, training, inference = model, copy_model(model), copy_model(model)
    masters = widen((training, inference), weights)
    for form in (training, inference) if masters is not weights else ():
        fold(form, weights)  # constants in bfloat16 can only be folded now
    buffers = train_batchnorms(training.graph, mode=batchnorm)
    frozen_statistics = freeze_batchnorms(training.graph)
    seed_dropouts(training.graph, mode=dropout)
    seed_random_operators(training.graph)
    _declare_statistics(training.graph)
    make_inference_form(inference.graph)
    for form in (training, inference):
        infer_shapes(form)
    _refuse_unkept_statistics(buffers, weights)
    roles = assign_roles(
        weights, {*buffers, *frozen_statistics}, set(buffers), train=train, freeze=freeze
    )
    _make_differentiable(training, {n for n, role in roles.items() if role is Role.PARAMETER})
    for form in (training, inference):
        note_shapes(form.graph)
        refuse_tables(form.graph)
        _keep_data_outputs(form.graph, weights)

    return PreparedModel(
        training=training,
        inference=inference,
        skeleton=skeleton,
        weights=masters,
        roles=roles,
        next_buffers=buffers,
    )


_MOST_CORRECTIONS = 32
"""How many times shapes are inferred again after a window too many."""


def _normalize(model: ir.Model, train: Sequence[str]) -> dict[str, ir.TensorProtocol]:
    """Bring a model to one way of writing it, whatever its opset and exporter; give its weights.

    What is found here is the same in training and prediction.
    """
    inline_functions(model)
    RemoveInitializersFromInputsPass()(model)
    _name_nodes(model.graph)
    lift_quantized(model.graph)
    weights = lift_weights(model.graph, train)
    adapt_opset(model)
    normalize_layouts(model.graph)
    normalize_ml_operators(model.graph)
    infer_shapes(model)
    _make_paddings_explicit(model)  # before a shape that it corrects becomes a constant
    if flatten_sequences(model.graph):
        infer_shapes(model)
    fold(model, weights)
    if flatten_sequences(model.graph):  # those that loops made
        infer_shapes(model)
        fold(model, weights)
    return_weights(model.graph, weights)
    check_ranks(model.graph)
    _make_paddings_explicit(model)
    separate_pads(model.graph)
    make_reductions_explicit(model.graph)
    return weights


def _make_paddings_explicit(model: ir.Model) -> None:
    """Make paddings explicit, one after the other where a size follows from another's windows.

    Raises:
        UnsupportedModel: more than ``_MOST_CORRECTIONS`` stand behind one another.
    """
    for _ in range(_MOST_CORRECTIONS):
        if not make_paddings_explicit(model.graph):
            return
        infer_shapes(model)
    raise UnsupportedModel(
        "the model",
        f"more than {_MOST_CORRECTIONS} poolings that round up stand behind one another, each with "
        "a last window that would begin behind the image",
        "export them with explicit padding",
    )


def _make_differentiable(training: ir.Model, trained: Collection[str]) -> None:
    """Write the training form in operators that have a gradient, behind the trained weights."""
    if not trained:
        refuse_integer_model(training.graph)
    if pass_gradients(training.graph, trained):
        infer_shapes(training)
    rewrite(training, trained)


_KEPT_OUTPUTS = {
    "LayerNormalization": ("mean", "inv_std"),
    "SoftmaxCrossEntropyLoss": ("log_prob",),
}
"""Optional outputs that the gradient of an operator reads."""


def _declare_statistics(graph: ir.Graph) -> None:
    """Declare the optional outputs that gradients need."""
    for node in graph:
        kinds = _KEPT_OUTPUTS.get(node.op_type, ())
        if node.domain or len(node.outputs) > len(kinds) or not kinds:
            continue
        node.resize_outputs(1 + len(kinds))
        for value, kind in zip(node.outputs[1:], kinds, strict=True):
            value.name = value.name or f"{node.outputs[0].name}#{kind}"


def make_inference_form(graph: ir.Graph) -> None:
    """Turn a model into its inference form, in place."""
    use_running_statistics(graph)
    remove_dropouts(graph)


def _keep_data_outputs(graph: ir.Graph, weights: Collection[str]) -> None:
    """Drop outputs that no input reaches, running statistics among them, and those of text."""
    data = find_dependents(graph, [value for value in graph.inputs if value.name not in weights])
    statistics = {value for node in list_batchnorms(graph) for value in node.outputs[1:]}
    lost = {value for value in graph.outputs if value.dtype == ir.DataType.STRING} | statistics
    kept = [value for value in graph.outputs if value in data and value not in lost]
    graph.outputs.clear()
    graph.outputs.extend(kept)


def _name_nodes(graph: ir.Graph) -> None:
    """Name every node uniquely, for errors, cuts and Dropout's keys."""
    taken: set[str] = set()
    for index, node in enumerate(graph):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{index}"
            while node.name in taken:
                node.name += "_"
        taken.add(node.name)


def _refuse_unkept_statistics(statistics: Collection[str], weights: Collection[str]) -> None:
    for name in statistics:
        if name not in weights:
            raise UnsupportedModel(
                f"running statistic '{name}' of a BatchNormalization",
                "it is computed in the graph, so it cannot be updated",
                "train with --batchnorm frozen",
            )
