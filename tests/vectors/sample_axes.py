"""Shapes of outputs, and the axis of their samples: the test vectors of joined batches."""

from __future__ import annotations

Shape = list[int | str | None]
Case = tuple[list[Shape], Shape, int | None]
"""The shapes of the data, the shape of an output, and the axis along which batches are joined."""
AxisCase = tuple[list[Shape], Shape, bool, int | None]
"""The same, with a word before the axis on whether the data come in batches of their own."""

_ROWS: list[Shape] = [["N", 4]]
_LESS: list[Shape] = [["N_less_1 + 1", 4]]
_TEXT: list[Shape] = [["N", "T"]]
_FIXED: list[Shape] = [[4, 3]]

_ARRAYS: list[Case] = [
    (_ROWS, ["N", 3], 0), (_ROWS, [1, "N", 4], 1), (_ROWS, [3, "N"], 1), (_ROWS, [2, 5, "N"], 2),
    (_ROWS, ["N", "N"], None), (_ROWS, [3], None), (_ROWS, [100, 4], None), (_ROWS, [], 0),
    (_ROWS, [1], 0), (_ROWS, [1, 1], 0), (_ROWS, ["3*N"], 0), (_ROWS, [2, "3*N"], 1),
    (_ROWS, ["N + -1", 3], None), (_ROWS, ["N + 1"], None), (_ROWS, ["N*N"], None),
    (_ROWS, ["(N)//(2)", 3], None), (_ROWS, ["N", "(N + 1)//(2)"], None), (_ROWS, [1, "NN"], None),
    (_ROWS, ["unk__/nms:0", 6], 0), (_ROWS, [None, 6], 0), (_ROWS, ["M", 6], 0),
    (_ROWS, [2, "unk__/nonzero:0"], None), (_ROWS, ["unk__a", "N"], 1),
    (_LESS, ["N_less_1 + 1", 3], 0), (_LESS, [1, "N_less_1 + 1", 4], 1),
    (_LESS, [5, "3*N_less_1 + 3"], 1), (_LESS, ["N_less_1", 3], None),
    (_TEXT, ["N", "T", 7], 0), (_TEXT, ["T", "N", 7], 1), (_TEXT, ["N*T", 7], 0),
    (_TEXT, ["T", 7], None), (_TEXT, [1, "T"], None),
    (_FIXED, [4, 4], 0), (_FIXED, [3, 4], 1), (_FIXED, [1, 4, 4], None), (_FIXED, [3], None),
    (_FIXED, ["unk__a", 3], 0), (_FIXED, [], 0), ([[1, 8]], [1, 1, 8], 0), ([[1, 8]], [8], None),
    ([["N", 4], ["M", 2]], ["N", 3], 0), ([["N", 4], ["M", 2]], [3, "M"], 1),
    ([["N", 4], ["M", 2]], ["N", "M"], None), ([["2*N", 4]], [1, "N"], 1), ([[None, 4]], ["N"], 0),
    ([["batch-size", 4]], [3, "batch-size"], 1),
]  # fmt: skip
_OWN_BATCHES: list[Case] = [
    ([["T", "N", 4]], ["N", 2], 0), ([[5, "N", 4]], ["N", 2], 0), ([[5, "N", 4]], [1, "N"], None),
    (_ROWS, [1, "N", 4], 1), (_ROWS, [3], None),
]  # fmt: skip


def build_sample_axes() -> list[AxisCase]:
    """Data, an output, whether the data come in batches of their own, and the axis."""
    return [
        (data, output, own, axis)
        for own, cases in ((False, _ARRAYS), (True, _OWN_BATCHES))
        for data, output, axis in cases
    ]
