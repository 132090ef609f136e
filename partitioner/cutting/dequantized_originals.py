"""Compare a dequantized model with the original, and measure what kernels of ONNX Runtime round.

A bundle made with ``--dequantize`` is compared with the dequantized model.  That model is compared
with the original in two forms: one still rounds activations as the original does, so both must
agree, and the other is what is trained, so the difference between both tells what rounding did.

A MatMulNBits multiplies floats, and its weights are trained as floats with or without the option.
But its accuracy level may allow a kernel to round them first, which is not what the model says.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from splitonnx.errors import DifferentResult, list_some
from splitonnx.partitioner.cutting.conformance.dataflow import NotRun, run_session
from splitonnx.partitioner.cutting.conformance.expectations import EXACT, Expectation, expect
from splitonnx.partitioner.cutting.conformance.measures import find_largest, list_differences
from splitonnx.partitioner.cutting.conformance.originals import (
    copy_original,
    dequantize_original,
    find_random,
    forbid_rounding,
    set_inference_modes,
)
from splitonnx.partitioner.gate.adjustments import Adjustments
from splitonnx.partitioner.gate.gates import ModelSource, read_original

_SEEDS = (0, 1)
"""Seeds for random inputs; a difference counts if both show it."""


def compare_dequantized(source: ModelSource, adjustments: Adjustments, subject: str) -> list[str]:
    """Compare a dequantized model with the original, and return remarks.

    ``subject`` names the original in error messages.

    Raises:
        DifferentResult: the results differ, although activations are rounded as in the original.
    """
    if not adjustments.dequantize:
        return []
    original = copy_original(read_original(source, adjustments))
    forbid_rounding(original)
    set_inference_modes(original)
    if (node := find_random(original)) is not None:
        return [f"{subject} was not compared before --dequantize: node '{node}' is random"]
    try:
        remark = _refuse_difference(original, subject)
        if remark:
            return [remark]
        expectation = expect(original, subject, _SEEDS[0])
        found = _run(dequantize_original(original), expectation, subject)
    except NotRun as error:
        return [f"{subject} was not compared before --dequantize, since it does not run: {error}"]
    outcome = expectation.reference or expectation.session or ()
    largest = find_largest(list_differences(outcome, found))
    if not largest.size:
        return [f"--dequantize left the results of {subject} as they were"]
    return [
        f"--dequantize changed the results of {subject} by up to {largest.size:.1e} of the largest "
        f"value, in '{largest.tensor}'"
    ]


def compare_kernels(source: ModelSource, adjustments: Adjustments, subject: str) -> list[str]:
    """Measure what the accuracy levels of MatMulNBits change in the original, and return remarks.

    This is a property of ONNX Runtime's kernels on this processor, and never a mistake.
    """
    given = copy_original(read_original(source, adjustments))
    set_inference_modes(given)
    exact = copy_original(given)
    levels = forbid_rounding(exact)
    if not levels:
        return []
    try:
        expectation = expect(exact, subject, _SEEDS[0])
        largest = find_largest(
            list_differences(expectation.session or (), _run(given, expectation, subject))
        )
    except NotRun as error:
        return [f"what the accuracy levels of MatMulNBits change was not measured: {error}"]
    if largest.size <= EXACT:
        return []
    return [
        f"ONNX Runtime's kernel for MatMulNBits with accuracy_level={max(levels.values())} "
        f"({list_some(list(levels))}) rounds activations to 8 bits, each by up to 1/254 of the "
        f"largest in its block, which changes the results of {subject} by {largest.size:.1e} of "
        f"the largest value, in '{largest.tensor}'; its parts and the merged model compute with "
        "the activations as they are (docs/quantization.md)"
    ]


def _refuse_difference(original: onnx.ModelProto, subject: str) -> str:
    """Compare the form that rounds activations with the original.

    A difference is an error if onnx's reference evaluator shows it.  ONNX Runtime's integer kernels
    saturate on some processors, and round inside an LSTM or an attention, which no form repeats.
    So a difference from these alone is returned as a remark.
    """
    rounding = dequantize_original(original, is_rounding=True)
    sizes, tensor, is_certain = [], "", True
    for seed in _SEEDS:
        expectation = expect(original, subject, seed)
        difference = expectation.find_difference(_run(rounding, expectation, subject))
        if not difference.size:
            return ""
        sizes.append(difference.size)
        tensor, is_certain = difference.tensor, is_certain and expectation.reference is not None
    if is_certain:
        raise DifferentResult(subject, "the dequantized model", tensor, tensor, min(sizes))
    return (
        f"--dequantize changed the results of {subject} by {min(sizes):.1e} of the largest value, "
        f"in '{tensor}', according to ONNX Runtime's integer kernels, which round "
        "inside an LSTM, too, and saturate on some processors (docs/quantization.md)"
    )


def _run(
    model: onnx.ModelProto, expectation: Expectation, subject: str
) -> Sequence[dict[str, np.ndarray]]:
    return run_session(model, expectation.batches, subject, level="none")
