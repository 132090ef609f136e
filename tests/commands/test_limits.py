"""The options of a server's limits: one each, with the default and the help of the limit."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.models import OptionInfo

from splitonnx.commands.limits import LIMITS, make_limits
from splitonnx.errors import UsageError
from splitonnx.runtime.limits import Limits, list_limits
from tests.support.commands import Command

OPTIONS: dict[str, OptionInfo] = {p.name: p.annotation.__metadata__[0] for p in LIMITS.parameters}


def test_there_is_an_option_for_each_limit_with_its_default_and_type() -> None:
    found = {p.name: (p.default, p.annotation.__origin__) for p in LIMITS.parameters}
    assert found == {f"max_{limit.name}": (limit.default, limit.type) for limit in list_limits()}


def test_an_option_s_help_says_what_holds_where_there_is_no_default() -> None:
    assert OPTIONS["max_batch"].help == "Rows of one message's tensors."
    assert OPTIONS["max_memory_bytes"].help == (
        "Bytes of all sessions' states; half of the machine's memory by default."
    )


@pytest.mark.parametrize(
    ("option", "limit"),
    [
        ("--max-strangers", "--max-unauthenticated"),
        ("--max-unauthenticated", "--max-unauthenticated"),
        ("--max-stranger-bytes", "--max-unauthenticated-bytes"),
        ("--max-unauthenticated-bytes", "--max-unauthenticated-bytes"),
    ],
)
def test_the_earlier_name_of_an_option_still_works(
    option: str, limit: str, command: Command, tmp_path: Path
) -> None:
    assert f"splitonnx: {limit} must be positive" in command.fail("serve", tmp_path, option, 0)


def test_the_values_of_the_options_become_the_limits() -> None:
    defaults = {parameter.name: parameter.default for parameter in LIMITS.parameters}
    assert make_limits(**defaults) == Limits()
    assert make_limits(**{**defaults, "max_batch": 7}) == Limits(batch=7)


def test_a_value_out_of_range_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^--max-batch must be positive"):
        make_limits(max_batch=0)


def test_limits_that_contradict_each_other_are_named_as_options() -> None:
    with pytest.raises(UsageError) as caught:
        make_limits(max_message_seconds=20.0, max_idle_seconds=10.0)
    assert str(caught.value) == "--max-message-seconds (20) is larger than --max-idle-seconds (10)"


def test_the_help_of_serve_shows_every_limit(command: Command) -> None:
    shown = "".join(command.succeed("serve", "--help").split())
    for limit in list_limits():
        assert f"--max-{limit.name.replace('_', '-')}"[:28] in shown
        assert limit.text.split()[0] in shown
