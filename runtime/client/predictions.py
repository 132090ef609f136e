"""Predictions of several batches, joined into one array for each output."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from splitonnx.errors import UsageError


def join_outputs(batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join the outputs of all batches, with samples along the first dimension.

    If an output is a single number per batch, its array contains one number for each batch.

    Raises:
        UsageError: the shapes of an output differ between batches in more than the first dimension.
    """
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    for outputs in batches:
        for name, array in outputs.items():
            parts[name].append(np.atleast_1d(array))
    for name, arrays in parts.items():
        if len({array.shape[1:] for array in arrays}) > 1:
            raise UsageError(
                f"the batches' outputs '{name}' differ in more than their first dimension; "
                "take them one by one with predict_batches"
            )
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}
