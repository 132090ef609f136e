"""Recognise tensors that were computed by a formula rather than learned.

Exporters store position tables, Fourier and cosine kernels, filter banks and coordinates in the
same way as weights.  Their numbers reveal them: for example, a sequence ``c`` of sines with the
frequency ``w`` satisfies ``c[t+1] + c[t-1] = 2 cos(w) c[t]`` for all ``t``, but learned numbers do
not.  Only the first numbers along each axis of a large tensor are read.  This module does not
consider where a tensor is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

Array = np.ndarray

_LOOKED_AT = 64
_LOOKED_AT_LAST = 1024
"""How many numbers of a large tensor are read along each axis, and along the last axis."""
_LARGE = 1 << 16
"""A tensor with more elements than this is large."""
_TOLERANCE = 5e-3
_COARSE = 2e-2
"""The tolerance for rounding, relative to the numbers; the second is for 16-bit types."""
_FINER_BITS = 0x1FFF
"""The bits of a float32 that neither float16 nor bfloat16 has."""
_LEAST_EVIDENCE = 6
"""The number of equations, beyond those that define a formula, that its numbers must satisfy."""
_SHORTEST = 4
"""The number of steps of a series that reveals itself only if its numbers are nearly exact."""
_EXACT = 1e-4
"""The tolerance for such a series, relative to its step, unless its type has 16 bits."""
_LEAST_PAIRED = 16
"""The number of sines and cosines that a single table has at least."""
_LEAST_TURNED = 3
"""The number of angles, beyond those of 0 and 90 degrees, that two tables of rotations show."""
_LARGEST_FACTOR = 64
"""The largest ratio between two numbers of a fixed filter."""


def describe_formula(tensor: ir.TensorProtocol) -> str | None:
    """Describe how a float tensor was computed, or return ``None`` if no known formula fits.

    The description completes the sentence "its numbers are ...".
    """
    if len(tensor.shape) == 0 or tensor.size < _SHORTEST:
        return None
    array = _read(tensor)
    sizes = np.abs(array)
    if not np.isfinite(sizes).all():
        return None
    tolerance = _COARSE if _is_coarse(array) else _TOLERANCE
    has_two_sizes = bool(((sizes == sizes.min()) | (sizes == sizes.max())).all())
    for words, test in _TESTS:
        if has_two_sizes and test is not _are_evenly_spaced:
            continue  # two sizes give away no other formula
        if test(array, tolerance):
            return words
    return None


def find_rotations(tensors: Mapping[str, ir.TensorProtocol]) -> set[str]:
    """Find pairs of tensors of one shape that hold the cosines and the sines of the same angles.

    Such tables rotate queries and keys by their positions.  They may be too short to reveal
    themselves one by one.
    """
    found: set[str] = set()
    energies: dict[tuple[int, ...], list[tuple[str, Array, float]]] = {}
    for name, tensor in tensors.items():
        if tensor.size < _LEAST_TURNED or not tensor.dtype.is_floating_point():
            continue
        array = _read(tensor)
        if not np.isfinite(array).all() or np.abs(array).max() > 1 + _COARSE:
            continue
        energy = float((array**2).mean())
        others = energies.setdefault(tuple(tensor.shape.numpy()), [])
        for other, table, own in others:
            if abs(own + energy - 1) <= _COARSE and _turn(array, table):
                found |= {name, other}
        others.append((name, array, energy))
    return found


def _turn(one: Array, other: Array) -> bool:
    """Return whether two tables are cosines and sines, of angles that are not all multiples of 90.

    Ones and zeros, as the first scale and shift of a normalization have, do not count.
    """
    tolerance = _COARSE if _is_coarse(one) or _is_coarse(other) else _TOLERANCE
    turned = (np.abs(one) > 1e-3) & (np.abs(other) > 1e-3)
    is_circle = np.abs(one**2 + other**2 - 1).max() <= tolerance
    return bool(is_circle and turned.sum() >= _LEAST_TURNED and np.ptp(one[turned]) > 1e-2)


def is_fixed_filter(tensor: ir.TensorProtocol) -> bool:
    """Return whether a convolution kernel looks like a fixed filter, such as a blur.

    The numbers of such a kernel are small whole numbers times a common factor.
    """
    array = _read(tensor)
    sizes = np.abs(array[array != 0])
    if len(array.shape) < 3 or np.prod(array.shape[2:]) < 2 or not sizes.size:
        return False
    if not np.isfinite(sizes).all():
        return False
    ratios = sizes / sizes.min()
    return bool((ratios <= _LARGEST_FACTOR).all() and np.allclose(ratios, ratios.round(), 0, 1e-4))


def has_whole_numbers(tensor: ir.TensorProtocol) -> bool:
    """Return whether a matrix consists of whole numbers that are not all equal.

    Such a matrix is probably a table of codes, not a learned weight.  Only a part of a large matrix
    is examined.
    """
    if sum(dim > 1 for dim in tensor.shape.numpy()) < 2:
        return False
    array = _read(tensor)
    if not np.isfinite(array).all() or array.min() == array.max():
        return False
    return bool((array == array.round()).all())


def _read(tensor: ir.TensorProtocol) -> Array:
    array = tensor.numpy()
    if array.size > _LARGE:
        array = array[(*(slice(_LOOKED_AT) for _ in array.shape[:-1]), slice(_LOOKED_AT_LAST))]
    return array.astype(np.float64)


def _is_coarse(array: Array) -> bool:
    """Return whether all numbers fit into 16-bit floats, even if they are stored in wider ones."""
    return not (array.astype(np.float32).view(np.uint32) & _FINER_BITS).any()


def _list_sequences(array: Array, least: int) -> Iterator[Array]:
    """Yield the array as columns, once for each axis with at least ``least`` numbers."""
    for axis, size in enumerate(array.shape):
        if size >= least:
            yield np.moveaxis(array, axis, 0).reshape(size, -1)


def _follow(columns: Array) -> tuple[Array, Array]:
    """Fit ``c[t+1] + c[t-1] = k c[t]`` to each column; return ``k`` and the relative error of each.

    The error of a column of zeros is 0 if other columns are not zero.
    """
    middle, sides = columns[1:-1], columns[2:] + columns[:-2]
    energy = (middle**2).sum(0)
    negligible = energy <= 1e-12 * energy.max()
    factors = np.where(negligible, 2, (middle * sides).sum(0) / np.where(negligible, 1, energy))
    rest = np.sqrt(((sides - factors * middle) ** 2).sum(0))
    return factors, np.where(negligible, 0, rest / np.sqrt(np.where(negligible, 1, energy)))


def _are_sines(array: Array, tolerance: float) -> bool:
    for columns in _list_sequences(array, 4):
        length, count = columns.shape
        if (length - 3) * count < _LEAST_EVIDENCE:
            continue
        factors, rests = _follow(columns)
        swinging = factors < 2 - 1e-3
        if (
            (rests <= tolerance).all()
            and (factors <= 2 + 1e-4).all()
            and swinging.sum() >= max(1, count // 10)
        ):
            return True
    return False


def _are_pairs(array: Array, tolerance: float) -> bool:
    """Return whether a table holds sines and cosines of the same angles, in a usual order.

    Sines and cosines may alternate, fill one half of each row, or fill one half of each half.  The
    table may begin with rows of zeros.
    """
    rows = array.reshape(-1, array.shape[-1])
    rows = rows[np.abs(rows).max(1) > 0]
    width = rows.shape[1]
    orders = [(rows[:, 0::2], rows[:, 1::2]), (rows[:, : width // 2], rows[:, width // 2 :])]
    if width % 4 == 0:
        quarters = rows.reshape(len(rows), 4, width // 4)
        orders.append((quarters[:, 0::2], quarters[:, 1::2]))
    for first, second in orders if width % 2 == 0 and rows.size >= _LEAST_PAIRED else []:
        squares = first**2 + second**2
        if np.ptp(np.abs(first)) < 0.1 * np.sqrt(squares.max()):
            continue
        if np.ptp(squares) <= tolerance * squares.max():
            return True
    return False


def _are_windowed(array: Array, tolerance: float) -> bool:
    """Return whether rows are oscillations times one window, as in a Fourier transform."""
    if len(array.shape) < 2 or min(array.shape[0], array.shape[-1]) < 8:
        return False
    if array.size != array.shape[0] * array.shape[-1]:
        return False
    rows = array.reshape(array.shape[0], -1)
    half = len(rows) // 2
    for real, imaginary in ((rows[:half], rows[half:]), (rows[0::2], rows[1::2])):
        if len(rows) % 2 or real.min() >= 0 or np.ptp(np.abs(real)) < 0.1 * real.max():
            continue
        windows = real**2 + imaginary**2
        if np.ptp(windows, axis=0).max() <= tolerance * windows.max():
            return True
    return _has_rising_tones(rows)


def _has_rising_tones(rows: Array) -> bool:
    if rows.shape[1] < 32 or rows.min() >= 0:
        return False
    power = np.abs(np.fft.rfft(rows, axis=1)) ** 2
    total = power.sum(1)
    power, total = power[total > 1e-12 * total.max()], total[total > 1e-12 * total.max()]
    peaks = power.argmax(1)
    near = np.abs(np.arange(power.shape[1]) - peaks[:, None]) <= 3
    concentrated = (power * near).sum(1) >= 0.98 * total
    return bool(
        concentrated.all()
        and (np.diff(peaks) >= 0).all()
        and len(set(peaks.tolist())) >= max(4, len(rows) // 2)
    )


def _is_window(array: Array, tolerance: float) -> bool:
    """Return whether a vector is a window, such as a Hann window: a sine plus a constant."""
    if array.size != max(array.shape) or array.size < 10 or array.min() < 0:
        return False
    steps = np.diff(array.reshape(-1, 1), axis=0)
    factors, rests = _follow(steps)
    return bool(factors[0] < 2 - 1e-6 and rests[0] <= tolerance)


def _is_filter_bank(array: Array, tolerance: float) -> bool:
    """Return whether rows or columns are successive triangles, like the filters of a mel bank."""
    squeezed = array.squeeze()
    if len(squeezed.shape) != 2 or squeezed.min() < 0 or (squeezed != 0).mean() > 0.5:
        return False
    return any(_are_triangles(filters) for filters in (squeezed, squeezed.T))


def _are_triangles(filters: Array) -> bool:
    filters = filters[filters.max(1) > 0]
    if min(filters.shape) < 4 or (filters > 0).sum() < 2 * len(filters):
        return False
    peaks = filters.argmax(1)
    if (np.diff(peaks) < 0).any() or peaks[0] == peaks[-1]:
        return False
    for row, peak in zip(filters, peaks, strict=True):
        steps = np.diff(row)
        if (steps[:peak] < 0).any() or (steps[peak:] > 0).any():
            return False
        support = np.flatnonzero(row)
        if support[-1] - support[0] + 1 != len(support):
            return False
    return True


def _are_evenly_spaced(array: Array, tolerance: float) -> bool:
    for columns in _list_sequences(array, _SHORTEST):
        steps = np.diff(columns, axis=0)
        first = steps[:1]
        if not first.any():
            continue
        allowed = tolerance / 5 if len(columns) > _SHORTEST else _limit_short(tolerance)
        if np.abs(steps - first).max() <= allowed * np.abs(first).max():
            return True
    return False


def _limit_short(tolerance: float) -> float:
    """Return the tolerance for a short series, relative to its step: few equations must do."""
    return _COARSE / 5 if tolerance == _COARSE else _EXACT


def _are_geometric(array: Array, tolerance: float) -> bool:
    """Return whether a vector is a geometric series, like the frequencies of a position table."""
    if array.size != max(array.shape) or array.min() <= 0:
        return False
    steps = np.diff(np.log(array.reshape(-1)))
    allowed = tolerance if array.size >= _LEAST_EVIDENCE else _limit_short(tolerance)
    return bool(abs(steps[0]) > 1e-3 and np.abs(steps - steps[0]).max() <= allowed * abs(steps[0]))


def _are_slopes(array: Array, tolerance: float) -> bool:
    """Return whether a vector holds the slopes of ALiBi, which are two joined geometric series.

    If the number of heads is not a power of two, the slopes of the next smaller power of two,
    ``r, r^2, r^3, ...``, come first.  Then follow ``r^0.5, r^1.5, ...``.  Other joined series of
    one ratio are recognised as well, if they are long enough.
    """
    if array.size != max(array.shape) or array.size < _LEAST_EVIDENCE or array.min() <= 0:
        return False
    logs = np.log(array.reshape(-1))
    first = 1 << (array.size.bit_length() - 1)
    powers = np.concatenate([np.arange(1, first + 1), np.arange(array.size - first) + 0.5])
    slopes = -8 / first * np.log(2) * powers
    if np.abs(logs - slopes).max() <= tolerance:
        return True
    steps = np.diff(logs)
    step = np.median(steps)
    other = np.abs(steps - step) > tolerance * abs(step)
    return bool(abs(step) > 1e-3 and other.sum() == 1 and len(steps) - 2 >= _LEAST_EVIDENCE)


_TESTS: Sequence[tuple[str, Callable[[Array, float], bool]]] = (
    ("evenly spaced, like coordinates", _are_evenly_spaced),
    ("a window, such as Hann's", _is_window),
    ("sines and cosines", _are_sines),
    ("sines and cosines of the same angles", _are_pairs),
    ("a geometric series, like frequencies", _are_geometric),
    ("two joined geometric series, like the slopes of attention heads", _are_slopes),
    ("oscillations under a window, like a Fourier transform's", _are_windowed),
    ("triangular filters, like a mel filter bank's", _is_filter_bank),
)
