"""Give a quantized model float weights, and replace its integer arithmetic if the user wants it."""

from __future__ import annotations

from splitonnx.partitioner.cutting.passes.work import Work
from splitonnx.partitioner.normalization.dequantized.replacements import dequantize
from splitonnx.partitioner.normalization.quantizations import lift_quantized


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
