"""Positions in the data, as checkpoints hold them."""

from __future__ import annotations

import msgspec
import pytest

from splitonnx.runtime.storage.positions import DataPosition

FIELDS = {"epoch": 1, "batch": 2, "batch_size": 8, "seed": 3, "shuffle": True, "samples": None}


def test_a_position_without_a_schedule_is_one_of_training_without() -> None:
    position = msgspec.convert(FIELDS, DataPosition)
    assert position.schedule == ""
    assert msgspec.json.decode(msgspec.json.encode(position), type=DataPosition) == position


@pytest.mark.parametrize("change", [{"epoch": -1}, {"batch": None}, {"place": 3}])
def test_a_position_that_is_none_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**FIELDS, **change}, DataPosition)
