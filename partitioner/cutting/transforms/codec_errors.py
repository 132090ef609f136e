"""Measure how much codecs change the predictions of a bundle's parts.

The parts without codecs have been compared with the original model.  So what is left is the error
of the codecs, which is no mistake: it is reported, and never refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx

from splitonnx.bundles import Bundle
from splitonnx.partitioner.cutting.conformance.dataflow import NotRun, run_split
from splitonnx.partitioner.cutting.conformance.samples import Arrays, iter_draws
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass

_SUBJECT = "the parts"
_MOST_BYTES = 1 << 26
"""The size of weights, in bytes, up to which predictions are made for a remark."""


@attribute_errors_to_pass("compared with and without codecs")
def describe_codec_error(
    plain: Bundle, encoded: Bundle, codecs: str, merge: Callable[[], bytes]
) -> Iterator[str]:
    """Yield a remark on the codecs' error in predictions from random inputs.

    ``plain`` is the same bundle without codecs, and ``merge`` makes a model of it.  Nothing is
    yielded if its weights have more than 64 MiB, or it takes no random inputs.
    """
    weights = [array for party in plain.parties.values() for array in party.weights.values()]
    if sum(array.nbytes for array in weights) > _MOST_BYTES:
        return
    for batches in iter_draws(onnx.load_from_string(merge()), 0):
        try:
            exact = run_split(plain, batches, _SUBJECT)
        except NotRun:
            continue
        error = _measure(plain, exact, run_split(encoded, batches, _SUBJECT))
        yield f"--wire {codecs} changes predictions from random inputs by {error:.1e} of their norm"
        return


def _measure(bundle: Bundle, exact: Sequence[Arrays], coded: Sequence[Arrays]) -> float:
    """Return the norm of the differences of all outputs, divided by the norm of the outputs."""
    names = [s.name for s in bundle.client.manifest.outputs if s.dtype.startswith("F")]
    gap = norm = 0.0
    for one, other in zip(exact, coded, strict=True):
        for name in names:
            wanted = one[name].astype(np.float64)
            gap += float(np.square(other[name] - wanted).sum())
            norm += float(np.square(wanted).sum())
    return float(np.sqrt(gap / norm)) if norm else 0.0
