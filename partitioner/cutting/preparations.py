"""Prepare a model for cutting: build its training form and its inference form.

The table in :mod:`passes` defines the steps and their order.
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
    """A model in two forms, one for training and one for prediction.

    Both forms were made from ``skeleton``: the model itself with its weights as inputs and with all
    of its outputs.  ``training`` and ``inference`` keep only the outputs that depend on the model's
    inputs.  ``weights`` holds the tensors that became graph inputs, in the model's order, and
    ``roles`` the role of each.  ``next_buffers`` maps a running statistic to the value in
    ``training`` that replaces it after a step.
    """

    training: ir.Model
    inference: ir.Model
    skeleton: ir.Model
    weights: Mapping[str, ir.TensorProtocol]
    roles: Mapping[str, Role]
    next_buffers: Mapping[str, str]

    @cached_property
    def state(self) -> frozenset[str]:
        """Names of the graph inputs that are not data: the weights and the key for Dropout."""
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
    """Prepare a checked model by running :data:`PASSES` in order; ``model`` itself is consumed.

    ``batchnorm`` and ``dropout`` override the modes set in the model.  ``train`` and ``freeze``
    hold regular expressions (``re.search``).  Parameters that match ``train`` are trained
    (:func:`weights.lift_weights`), and parameters that match ``freeze`` keep their value; ``train``
    takes precedence.

    Raises:
        UnsupportedModel: its operators cannot be converted to opset 18 to 21, or a pattern
            matches nothing.
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
