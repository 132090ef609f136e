"""Compute positions and weights for interpolation along one axis.

They define which input elements each output element reads.  The formulas are those of Resize-19 at
onnx.ai/onnx/operators; antialiasing works as in the reference implementation of the onnx package.
This module only does arithmetic on sizes and scales; it does not build graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The parameters for resizing one axis from ``before`` elements to ``after`` elements.

    ``scale`` is the scale factor in the model, which may differ slightly from ``after / before``
    because ``after`` is rounded.  ``coordinates`` is the node's ``coordinate_transformation_mode``.
    In the mode ``tf_crop_and_resize``, ``start`` and ``end`` are the bounds of the region to
    resize, as fractions of the axis.
    """

    before: int
    after: int
    scale: float
    coordinates: str
    start: float = 0.0
    end: float = 1.0

    @property
    def identical(self) -> bool:
        """Return whether resizing leaves the axis unchanged."""
        whole = (self.start, self.end) == (0.0, 1.0)
        return self.before == self.after and np.isclose(self.scale, 1.0).item() and whole


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """The interpolation kernel of a Resize node.

    ``mode`` is ``"linear"`` or ``"cubic"``, and ``sharpness`` is the coefficient a of the cubic
    kernel.  If ``antialias`` is true, the kernel is stretched when the axis becomes smaller.  If
    ``exclude_outside`` is true, elements outside the input get the weight 0.
    """

    mode: str
    sharpness: float = -0.75
    antialias: bool = False
    exclude_outside: bool = False


def find_coordinates(sampling: Sampling, dtype: type[np.floating] = np.float64) -> np.ndarray:
    """Return the position of each output element in the coordinates of the input."""
    y: np.ndarray = np.arange(sampling.after).astype(dtype)
    n, scale, half = dtype(sampling.before), dtype(sampling.scale), dtype(0.5)
    x: np.ndarray = (y + half) / scale - half
    match sampling.coordinates:
        case "align_corners" if sampling.after > 1:
            x = y * (n - 1) / dtype(sampling.after - 1)
        case "align_corners" | "pytorch_half_pixel" if sampling.after == 1:
            x = np.zeros(1, dtype)
        case "asymmetric":
            x = y / scale
        case "half_pixel_symmetric":
            x = x + n / 2 * (1 - dtype(sampling.after) / (scale * n))
        case "tf_crop_and_resize":
            extent = dtype(sampling.end - sampling.start) * (n - 1)
            x = y * extent / dtype(sampling.after - 1) if sampling.after > 1 else y + extent / 2
            x = x + dtype(sampling.start) * (n - 1)
    return x


def find_nearest(sampling: Sampling, mode: str) -> np.ndarray:
    """Return the index of the input element that each output element copies.

    ``mode`` is the node's ``nearest_mode``, which defines how positions are rounded.  The positions
    are computed in float32, as in ONNX Runtime, because rounding can decide which of two neighbours
    is nearer.
    """
    x = find_coordinates(sampling, np.float32)
    match mode:
        case "floor":
            found = np.floor(x)
        case "ceil":
            found = np.ceil(x)
        case "round_prefer_ceil":
            found = np.floor(x + np.float32(0.5))
        case _:
            found = np.ceil(x - np.float32(0.5))
    places: np.ndarray = np.clip(found, 0, sampling.before - 1).astype(np.int64)
    return places


def find_outside(sampling: Sampling) -> np.ndarray:
    """Return a boolean mask that marks the output elements with positions outside the input.

    The marked elements get the extrapolation value.  Elements are marked only in the mode
    ``tf_crop_and_resize``.
    """
    if sampling.coordinates != "tf_crop_and_resize":
        return np.zeros(sampling.after, bool)
    x = find_coordinates(sampling)
    outside: np.ndarray = (x < 0) | (x > sampling.before - 1)
    return outside


def weigh_neighbours(sampling: Sampling, kernel: Kernel) -> np.ndarray:
    """Return the weights of the interpolation as a matrix of shape (after, before).

    Each row contains the weights of all input elements for one output element.
    """
    x = find_coordinates(sampling)
    n = sampling.before
    shrink = min(sampling.scale, 1.0) if kernel.antialias else 1.0
    radius = 1 if kernel.mode == "linear" else 2
    reach = int(np.ceil(radius / shrink))
    # the left element is at most 1 away, so an integer position has one more neighbour there
    places = (np.ceil(x) - 1).astype(np.int64)[:, None] + np.arange(1 - reach, reach + 1)
    distances = np.abs((x[:, None] - places) * shrink)
    weights = np.clip(1 - distances, 0, 1) if radius == 1 else _cubic(distances, kernel.sharpness)
    if kernel.exclude_outside:
        weights = np.where((places < 0) | (places >= n), 0.0, weights)
    if kernel.exclude_outside or kernel.antialias:
        total = weights.sum(1, keepdims=True)
        weights = weights / np.where(total == 0, 1.0, total)
    matrix = np.zeros((sampling.after, n))
    rows = np.broadcast_to(np.arange(sampling.after)[:, None], places.shape)
    np.add.at(matrix, (rows, np.clip(places, 0, n - 1)), weights)
    matrix[find_outside(sampling)] = 0.0
    return matrix


def _cubic(distances: np.ndarray, a: float) -> np.ndarray:
    """Compute the weights of Keys' cubic convolution (IEEE TASSP 29, 1981)."""
    near = ((a + 2) * distances - (a + 3)) * distances**2 + 1
    far = ((a * distances - 5 * a) * distances + 8 * a) * distances - 4 * a
    return np.where(distances <= 1, near, np.where(distances < 2, far, 0.0))
