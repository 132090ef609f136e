"""Bring a model into the two forms that the rest works on: one to train, one to predict.

The forms are made by the table in :mod:`passes`, whose order this module follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from splitonnx.manifests import KEY, Role
from splitonnx.names import BatchNormMode, DropoutMode
from splitonnx.partitioner.cutting.passes.passes import PASSES, Work
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass


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


def prepare(
    model: ir.Model,
    *,
    batchnorm: BatchNormMode | None = None,
    dropout: DropoutMode | None = None,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
) -> PreparedModel:
    """Prepare a gated model by :data:`PASSES`, in their order; ``model`` itself is consumed.

    ``batchnorm`` and ``dropout`` overrule what the model says.  ``train`` and ``freeze`` hold
    regular expressions (``re.search``): what one of ``train`` finds is trained
    (:func:`weights.lift_weights`), what one of ``freeze`` finds keeps its
    value; ``train`` overrules ``freeze``.

    Raises:
        UnsupportedModel: its operators cannot be brought to opset 18 to 21, or a pattern fits
            nothing.
        UsageError: a pattern is not a regular expression or has no effect.
    """
    work = Work(model=model, batchnorm=batchnorm, dropout=dropout, train=train, freeze=freeze)
    for step in PASSES:
        with attribute_errors_to_pass(step.work):
            step.run(work)
    return PreparedModel(
        training=work.training,
        inference=work.inference,
        skeleton=work.model,
        weights=work.masters,
        roles=work.roles,
        next_buffers=work.buffers,
    )
