"""Which event loop a server runs on, and how it says so."""

from __future__ import annotations

import asyncio
import sys
from importlib.metadata import version
from types import ModuleType

import pytest

from splitonnx.runtime.scheduling import event_loops


async def find_module() -> str:
    """Return the name of the module that the running event loop is from."""
    return type(asyncio.get_running_loop()).__module__


def test_uvloop_is_taken_where_it_is_installed() -> None:
    pytest.importorskip("uvloop", reason="it has no wheel for this platform")
    assert event_loops.run(find_module()) == "splitonnx.runtime.scheduling.accepting_loops"
    assert event_loops.describe() == f"the event loop is uvloop's {version('uvloop')}"


def test_without_uvloop_asyncio_s_own_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert event_loops.run(find_module()).startswith("asyncio.")
    assert event_loops.describe() == "the event loop is asyncio's; uvloop is not installed"


@pytest.mark.parametrize("old", ["0.22.1", "0.9", "0.22.0b1"])
def test_an_old_uvloop_is_not_taken(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 0.23 it lost the reason of a refusal, which it had not sent yet."""
    monkeypatch.setitem(sys.modules, "uvloop", ModuleType("uvloop"))
    monkeypatch.setattr(event_loops, "version", lambda _: old)
    assert event_loops.run(find_module()).startswith("asyncio.")
    expected = f"the event loop is asyncio's; uvloop {old} is older than 0.23"
    assert event_loops.describe() == expected


def test_a_result_is_returned_and_an_error_raised() -> None:
    async def fail() -> None:
        raise ValueError("of its own")

    async def succeed() -> int:
        return 3

    assert event_loops.run(succeed()) == 3
    with pytest.raises(ValueError, match="of its own"):
        event_loops.run(fail())
