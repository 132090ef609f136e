"""Cuts that are refused name what stands in their way."""

from __future__ import annotations

import pytest

from splitonnx.errors import NotACut
from splitonnx.partitioner.partitions import cut
from tests.support.small_models import load_model

IN_THE_WAY = {
    ("34_passed_through", "b"): ("x",),
}
"""Cuts, and the raw inputs that the server would need for an output of its own."""


@pytest.mark.parametrize(("name", "at"), IN_THE_WAY)
def test_a_cut_that_would_need_a_raw_input_names_it(name: str, at: str) -> None:
    with pytest.raises(NotACut) as refused:
        cut(load_model(name), at=at, loss="mse")
    assert tuple(refused.value.missing) == IN_THE_WAY[name, at]
    assert f"'{at}' do not divide the model: 'x'" in str(refused.value)
    assert "stays home" in str(refused.value)
