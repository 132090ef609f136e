"""Operators that trade channels for pixels, with extents that only the data know."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.support.images import Case, hold


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
@pytest.mark.parametrize("dynamic", [(0,), (0, 1), (0, 1, 2, 3)])
def test_depth_to_space(mode: str, dynamic: Sequence[int]) -> None:
    attributes = {"blocksize": 2, "mode": mode}
    hold(Case(kind="DepthToSpace", x=(2, 8, 2, 3), attributes=attributes, dynamic=dynamic))


@pytest.mark.parametrize("dynamic", [(0,), (0, 1, 2, 3)])
def test_space_to_depth(dynamic: Sequence[int]) -> None:
    hold(Case(kind="SpaceToDepth", x=(2, 2, 4, 6), attributes={"blocksize": 2}, dynamic=dynamic))
