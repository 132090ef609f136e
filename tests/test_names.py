"""The names that are shared, which files and messages of earlier versions hold too."""

from __future__ import annotations

from splitonnx import names
from splitonnx.commands import options


def test_phases_parties_and_the_loss_are_called_as_ever() -> None:
    assert (names.TRAIN, names.PREDICT, names.EVALUATE) == ("train", "predict", "evaluate")
    assert (names.CLIENT, names.SERVER, names.LOSS) == ("client", "server", "loss")


def test_the_command_line_offers_the_same_targets_and_modes() -> None:
    assert [target.value for target in options.Target] == list(names.TARGETS)
    assert set(names.TARGETS) == {names.PORTABLE, names.TRAINING}
    assert {mode.value for mode in options.Dropout} == {"keep", "off"}
