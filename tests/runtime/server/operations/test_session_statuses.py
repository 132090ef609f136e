"""The value that says what a session is doing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from splitonnx.bundles import Bundle
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.server.operations.session_statuses import SessionStatus
from tests.support.callers import ACTIVATION, GRADIENT, SESSION, Caller, make_task
from tests.support.zoo import ZOO


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


def test_the_status_of_a_session_is_a_value_that_later_messages_do_not_change(
    bundle: Bundle,
) -> None:
    caller = Caller(bundle, owner="ann")
    session = caller.dispatcher.session
    assert session is not None
    before = session.status
    session.note_received(10, 5.0)
    session.note_sent(4)
    caller.say(make_task(), ACTIVATION)
    assert before == SessionStatus(
        id=SESSION,
        owner="ann",
        step=0,
        open_phases=frozenset(),
        is_saved=True,
        bytes_up=0,
        bytes_down=0,
        received_at=None,
    )
    caller.say(make_task(turn=1), GRADIENT)
    caller.say(make_task(step=1), ACTIVATION)
    session.note_received(6, 7.5)
    assert session.status == replace(
        before,
        step=1,
        open_phases=frozenset({"train"}),
        is_saved=False,
        bytes_up=16,
        bytes_down=4,
        received_at=7.5,
    )
