"""Shapes, and declarations that they fit or do not fit: the test vectors of dimensions."""

from __future__ import annotations

import numpy as np

from splitonnx.errors import SplitonnxError
from splitonnx.tensors import TensorSpec, check_array

ShapeCase = tuple[list[int | str | None], list[int], dict[str, int]]
"""A declaration, a shape, and the sizes that are bound."""


def build_shapes() -> list[dict[str, object]]:
    """Shapes against declarations where sizes are bound already: what is bound then, or refused."""
    large = 2**31 - 1
    some, other = "(H + -1)//(2) + 1", "((T)//(2) + 1)//(3)"
    sums: list[str] = [
        "N", "2*N*T + 1", "N + -1", "-1*N + T", "2 * N * T", "N*M + T", "N*M*M", "N*N", "M",
        "0*M + N", "floor(N/2)", "(N)//(2)", other, "(N)//(0)", "unk__a + N", "900719925474099*N",
        "N + ", "((((", "",
    ]  # fmt: skip
    alone: list[int | str | None] = ["N", "unk__/l.1/Conv:2", "2*N + 1", None, 0, 1, "7"]
    known: list[dict[str, int]] = [{}, {"H": 3}, {"(H + -1)//(2)": 0}, {some: 2}]
    cases: list[ShapeCase] = []
    cases += [([d], [n], {}) for d in alone for n in (0, 1, 2, 3, 7, large, large + 1, 2**40)]
    cases += [([d], [n], {"N": 3, "T": 9}) for d in sums for n in (0, 1, 2, 3, 6, 9, 12, 30, 55)]
    cases += [([some], [n], sizes) for n in (1, 2, 3) for sizes in known]
    cases += [
        (["N"], [1, 1], {}), (["N", "N"], [1], {}), ([], [], {}), ([], [1], {}),
        (["N", "N"], [2, 2], {}), (["N", "N"], [2, 3], {}), (["T", "N"], [4, 2], {"N": 3}),
        (["2*N + 1", "N"], [7, 3], {}), (["2*N + 1", "N"], [7, 4], {}),
        (["A*B", "A", "B"], [6, 2, 3], {"A*B": 6}), (["A*B", "A", "B"], [5, 2, 2], {}),
        (["A"], [2], {"A*B": 6, "B": 2}), (["A"], [3], {"A*B": 6, "B": 2}),
        (["A*B"], [4], {"A*B": 6, "A": 2, "B": 2}), (["A*B"], [5], {"A*B": 6}),
        (["H"], [7], {"(H)//(2)": 3}), (["H"], [9], {"(H)//(2)": 3}),
        (["N_less_1 + 1", 4], [7, 3], {"N_less_1": 2}), (["N_less_1 + 1"], [1], {}),
        (["4*N_less_1*T + 4*T"], [3], {"N_less_1": 2, "T": 5}),
        (["(2*N_less_1 + 1)//(2) + 1"], [9], {"N_less_1": 2}),
        (["A*A", "A"], [9, 3], {"A*A": 9}), (["A*A", "A"], [9, 2], {}), (["A*A"], [8], {"A": 3}),
    ]  # fmt: skip
    many = "unk__/nms:0"
    counted: list[ShapeCase] = [
        ([many, 3], [0, 3], {}), ([many, "N"], [0, 3], {}), (["N", many], [0, 3], {}),
        ([many], [0], {many: 0}), ([many], [0], {many: 2}), ([many], [2], {many: 0}),
        ([f"2*{many}"], [0], {}), ([f"{many} + 1"], [1], {}), ([f"{many} + 1"], [0], {}),
        ([f"N*{many}"], [0], {}), ([f"N*{many}", "N"], [0, 2], {}), (["N"], [0], {many: 0}),
        ([None], [0], {}), ([f"N*{many}"], [4], {many: 0}), (["num", 6], [0, 6], {"N": 3}),
        (["N", 6], [0, 6], {"N": 3}), (["num", 6], [2, 6], {"num": 0}),
    ]  # fmt: skip
    return [
        *(_try_shape(*case) for case in [*cases, *counted]),
        *(_try_shape(*case, is_output=True) for case in counted),
    ]


def _try_shape(
    declared: list[int | str | None],
    shape: list[int],
    sizes: dict[str, int],
    *,
    is_output: bool = False,
) -> dict[str, object]:
    bound, error = dict(sizes), ""
    array = np.broadcast_to(np.float32(0), shape)  # it takes no memory
    try:
        spec = TensorSpec(name="h", dtype="F32", shape=tuple(declared))
        check_array(array, spec, bound, is_output=is_output)
    except SplitonnxError as caught:
        error = str(caught)
    return {
        "declared": declared, "shape": shape, "sizes": sizes, "is_output": is_output,
        "bound": bound, "error": error,
    }  # fmt: skip
