"""A client's channel on an event loop: it does what the exchange wants, as the waiting one does."""

from __future__ import annotations

import json

import pytest

from tests.conftest import ROOT
from tests.support.async_players import play_async_channel
from tests.support.exchange_scripts import SCRIPTS

VECTORS = json.loads((ROOT / "tests" / "vectors" / "exchanges.json").read_text())


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_shell_on_an_event_loop_follows_the_same_scripts(name: str) -> None:
    transmitted, told = play_async_channel(name)
    follows = [one for entry in VECTORS[name] for one in entry["follows"]]
    assert transmitted == [one[1] for one in follows if one[0] == "transmit"]
    assert told == [one for one in follows if one[0] not in ("transmit", "connect", "hang up")]
