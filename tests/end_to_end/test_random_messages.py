"""Random messages, well-formed but wrong, against a server while an honest client trains in it.

They are few here and always the same; ``make attack`` sends 20,000 others, and holds a stopwatch.
Here none is held, and the memory that is measured is the server's own: others may run beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.processes import Checkout
from tests.attacks.randoms import BOUND_MIB, Battle, send_messages
from tests.attacks.verdicts import Ground
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

MESSAGES = 1500


@pytest.fixture
def battle(tmp_path: Path) -> Iterator[Battle]:
    with Battle(Ground(Checkout(ROOT), tmp_path)) as running:
        yield running


def test_random_messages_neither_end_the_server_nor_reach_an_honest_client(battle: Battle) -> None:
    send_messages(battle, MESSAGES, None, derandomize=True)
    battle.end_lines()
    battle.check()
    grown = battle.server.memory_mib("VmHWM") - battle.before
    seconds, differing = battle.finish()
    print(f"{grown:+.0f} MiB, {len(seconds)} honest steps, answers: {battle.seen.answers}")
    assert differing == 0
    assert grown <= BOUND_MIB
    assert "Traceback" not in battle.server.log
    assert battle.seen.answers["Tensors"] > MESSAGES / 10  # it came to where steps are made
    assert battle.seen.answers["ArrayMismatch"]
    assert battle.seen.answers["ForeignSession"]
