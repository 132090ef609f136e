"""Match trained weights with the tensors of a network, by name and shape.

This module works on numpy arrays, and does not use PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from splitonnx.errors import WeightsMismatch
from splitonnx.torch.networks import Layout


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Trained weights by name.

    ``source`` describes where the weights come from, for error messages.  ``trained`` are the names
    of the weights that training changes.  ``ties`` has an entry for each parameter that ``--tie``
    removed: the name of the parameter that replaced it, and whether the removed parameter is the
    transpose of the other.
    """

    source: str
    arrays: Mapping[str, np.ndarray] = field(repr=False)
    trained: frozenset[str]
    ties: Mapping[str, tuple[str, bool]] = field(default_factory=dict)


def match(
    weights: Weights, layout: Layout, shapes: Mapping[str, tuple[int, ...]], *, strict: bool
) -> dict[str, np.ndarray]:
    """Return the trained arrays to load into a network, by the names of the network's tensors.

    ``shapes`` maps these names to the shapes that the network has.  A tied weight is returned under
    all of its names.  If ``strict`` is false, parameters and statistics without a trained tensor
    are omitted.

    Raises:
        WeightsMismatch: a parameter or statistic is missing, a trained tensor is not in the
            network, a shape differs, or weights that are tied in the network have different values.
    """
    arrays = _untie(weights, shapes)
    unexpected = sorted(weights.trained - shapes.keys())
    found: dict[str, np.ndarray] = {}
    different: list[str] = []
    for name, shape in shapes.items():
        stored = [other for other in layout.groups.get(name, (name,)) if other in arrays]
        if not stored:
            continue
        first, *others = stored
        array = arrays[first]
        if tuple(array.shape) != tuple(shape):
            different.append(f"'{name}' is {list(shape)} in the network, but {list(array.shape)}")
        elif any(not np.array_equal(array, arrays[other], equal_nan=True) for other in others):
            different.append(f"'{first}' and '{others[0]}' are one tensor in the network, but two")
        found[name] = array
    needed = {*layout.learnt, *layout.statistics} & shapes.keys()
    missing = sorted(needed - found.keys()) if strict else []
    if missing or unexpected or different:
        raise WeightsMismatch(weights.source, missing, unexpected, tuple(dict.fromkeys(different)))
    if not found:
        raise WeightsMismatch(weights.source, sorted(shapes))
    return found


def _untie(weights: Weights, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Add the parameters that ``--tie`` removed, if the network has them."""
    arrays = dict(weights.arrays)
    for name, (kept, is_transposed) in weights.ties.items():
        if name in shapes and kept in arrays and name not in arrays:
            arrays[name] = arrays[kept].T if is_transposed else arrays[kept]
    return arrays
