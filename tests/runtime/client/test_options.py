"""What a fit is asked to do, checked before it begins."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from splitonnx.errors import UsageError
from splitonnx.runtime.client.datasets import open_dataset
from splitonnx.runtime.client.options import FitOptions, require_positive
from tests.support import tiny


def test_counts_from_one_on_are_taken() -> None:
    require_positive(epochs=1, batch_size=32)
    require_positive()


@pytest.mark.parametrize("count", [0, -1, -100])
def test_a_count_below_one_is_refused_by_its_name(count: int) -> None:
    with pytest.raises(UsageError, match=f"batch_size must be at least 1, not {count}"):
        require_positive(epochs=3, batch_size=count)


def test_the_options_of_a_fit_do_not_change_while_it_runs() -> None:
    options = FitOptions(
        training=open_dataset(tiny.batch(0)),
        held_out=None,
        epochs=2,
        learning_rate=None,
        checkpoint_every=None,
        when_unsaved="stop",
        save=False,
        on_step=None,
        on_epoch=None,
    )
    with pytest.raises(FrozenInstanceError):
        options.epochs = 3  # type: ignore[misc]
