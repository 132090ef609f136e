"""The settings of a cut, as a bundle's manifest keeps them."""

from __future__ import annotations

import msgspec

from splitonnx.losses import Loss, complete_losses
from splitonnx.names import TRAINING, BatchNormModes, DropoutMode, Target
from splitonnx.optimizers import Description


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a cut.

    With these settings, the same model can be cut again or trained without a cut.  ``dims`` and
    ``bound`` contain the sizes and the constant values that the user set for inputs.  ``ties`` are
    pairs of parameters that are treated as one, and no gradient passes through the tensors in
    ``stop_gradients``.  ``states`` are pairs of an output and the input that it replaces after each
    training step.  ``dequantize`` is true if floats replaced arithmetic with integers.
    ``class_axis`` is the axis of the output that represents the classes, and ``labels`` is the name
    of the array that contains the labels.  If there are several losses, or one with other settings,
    ``losses`` contains them all, and ``loss``, ``output``, ``class_axis`` and ``labels`` describe
    the first; otherwise ``losses`` is empty, as it is in bundles of earlier versions.  ``wire``
    holds the codecs of what crosses the cut; it is not written if tensors are sent as they are.
    ``recompute`` names the parties that compute their forward stage again before their backward
    stage; it is not written if none does.
    """

    at: tuple[str, ...]
    tail_at: tuple[str, ...]
    loss: str
    output: str
    optimizer: Description
    batchnorm: BatchNormModes = None
    dropout: DropoutMode | None = None
    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    dims: dict[str, int | str] = {}
    bound: dict[str, list[float]] = {}
    ties: tuple[tuple[str, str], ...] = ()
    stop_gradients: tuple[str, ...] = ()
    states: tuple[tuple[str, str], ...] = ()
    dequantize: bool = False
    class_axis: int | None = None
    labels: str = "labels"
    losses: tuple[Loss, ...] = ()
    client_target: Target = TRAINING
    server_target: Target = TRAINING
    wire: str | msgspec.UnsetType = msgspec.UNSET
    recompute: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET

    def list_losses(self) -> tuple[Loss, ...]:
        """Return all losses with their settings."""
        if self.losses:
            return self.losses
        return complete_losses(self.loss, self.output, self.class_axis, self.labels)
