"""Options that several commands share, and what they mean together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from splitonnx.commands.options import (
    choose_batch_size,
    make_optimizer,
    read_groups,
    refuse_both,
)
from splitonnx.errors import UsageError
from splitonnx.optimizers import SGD, AdamW, ParameterGroup
from splitonnx.runtime.client.datasets import open_dataset
from tests.support.commands import AT, MODEL, Command


def test_a_setting_that_the_optimizer_lacks_is_refused(command: Command, tmp_path: Path) -> None:
    line = command.fail("cut", MODEL, "--at", AT, "--momentum", 0.9, "-o", tmp_path / "bundle")
    assert "adamw has no setting 'momentum'" in line


def test_what_was_not_given_takes_the_optimizer_s_own_default() -> None:
    made = make_optimizer(None, lr=None, momentum=None, weight_decay=None, clip_norm=None)
    assert made == AdamW()
    given = make_optimizer("sgd", lr=0.5, momentum=0.9, weight_decay=None, clip_norm=None)
    assert given == SGD(lr=0.5, momentum=0.9)


def test_zero_is_given_and_not_left_out() -> None:
    made = make_optimizer("sgd", lr=0.0, momentum=None, weight_decay=None, clip_norm=None)
    assert made.lr == 0.0


def test_an_optimizer_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="'rmsprop'"):
        make_optimizer("rmsprop", lr=None, momentum=None, weight_decay=None, clip_norm=None)


@pytest.mark.parametrize(
    ("given", "is_refused"),
    [((True, True), True), ((True, False), False), ((False, True), False), (("a", None), False)],
)
def test_of_two_options_that_exclude_each_other_one_may_be_given(
    given: tuple[object, ...], is_refused: bool
) -> None:
    if not is_refused:
        refuse_both("--json", "--quiet", *given)
        return
    with pytest.raises(UsageError) as caught:
        refuse_both("--json", "--quiet", *given)
    assert "--json" in str(caught.value)
    assert "--quiet" in str(caught.value)


def test_a_batch_size_is_for_data_that_are_not_divided_into_batches() -> None:
    rows, batches = open_dataset({"x": np.zeros(3)}), open_dataset([{"x": np.zeros(3)}])
    assert choose_batch_size(None, batches) == choose_batch_size(None, rows) == 32
    assert choose_batch_size(8, rows) == choose_batch_size(8, batches, rows) == 8
    with pytest.raises(UsageError, match="--batch-size has no effect"):
        choose_batch_size(8, batches, batches)


def test_parameter_groups_are_read_behind_the_last_equals_sign() -> None:
    assert read_groups(None) == ()
    assert read_groups(["bias$=weight-decay:0", "a=b=lr-factor:0.1,weight-decay:1e-3"]) == (
        ParameterGroup(pattern="bias$", weight_decay=0),
        ParameterGroup(pattern="a=b", lr_factor=0.1, weight_decay=1e-3),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bias$", "write it as REGEX=lr-factor"),
        ("bias$=", "write it as REGEX=lr-factor"),
        ("=lr-factor:1", "write it as REGEX=lr-factor"),
        ("b=lr:1", "write it as REGEX=lr-factor"),
        ("b=lr-factor:1,lr-factor:2", "write it as REGEX=lr-factor"),
        ("b=lr-factor:fast", "'fast' is not a number, for lr-factor"),
        ("b=lr-factor", "'' is not a number, for lr-factor"),
        ("b=weight-decay:-1", "weight_decay must be at least 0"),
        ("(=weight-decay:0", "not a regular expression"),
    ],
)
def test_a_malformed_parameter_group_is_refused(text: str, expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        read_groups([text])
