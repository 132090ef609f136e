"""Give a quantized model float weights, and replace its integer arithmetic if the user wants it."""

from __future__ import annotations

from splitonnx.partitioner.cutting.passes.given_names import list_names
from splitonnx.partitioner.cutting.passes.work import Work
from splitonnx.partitioner.normalization.dequantized.replacements import dequantize
from splitonnx.partitioner.normalization.quantizations import lift_quantized


def lift_integers(work: Work) -> None:
    """Replace the integer weights of a model with float weights, in place.

    Integer arithmetic is replaced only if the user asked for it.  The tensors of the replacement
    then count as tensors of the user's model, because they have the names of the float model that
    was quantized.

    Raises:
        UnsupportedModel: an operator cannot be replaced.
        UsageError: the user asked for it, but the model does not compute with integers.
    """
    if work.dequantize:
        work.dequantized = dequantize(work.model)
        work.given |= list_names(work.model.graph)
    lift_quantized(work.model.graph)
