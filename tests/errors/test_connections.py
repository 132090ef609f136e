"""Errors between two parties: what each says, and which kind it is."""

from __future__ import annotations

import pytest

from splitonnx.errors import (
    BundleMismatch,
    ConnectionLost,
    ForeignSession,
    LocalProtocolError,
    MessageTooLarge,
    NotPermitted,
    PortInUse,
    ProtocolError,
    Redirected,
    RemoteFault,
    RemoteProtocolError,
    ServerBusy,
    SessionLost,
    SessionsNotListed,
    SplitonnxError,
    StaleConnection,
    StateNotFetched,
    StepConflict,
    StepsLost,
    Unauthorized,
    UntrustedPeer,
    UnusableFile,
    WorkerLost,
)
from tests.support.sentences import check_sentence

EVIL = "a\nb\x1b[2J"

ERRORS: list[tuple[SplitonnxError, tuple[object, ...]]] = [
    (LocalProtocolError("no task is open"), ("no task is open",)),
    (RemoteProtocolError("it lied"), ("it lied",)),
    (BundleMismatch("the digest", "d1", "e2"), ("the digest", "d1", "e2", "one bundle")),
    (ServerBusy("4 clients"), ("4 clients", "later")),
    (StaleConnection(1, 7), (1, 7)),
    (SessionLost("5" * 32, (4, 2), (9,)), ("5" * 32, "4 or 2", 9, "--resume", "--restart")),
    (SessionLost("5" * 32, (4,), ()), ("none",)),
    (ForeignSession("5" * 32), ("5" * 32, "token")),
    (StepConflict(3), (3, "--restart")),
    (StepsLost(4), (4,)),
    (RemoteFault("StageFailed", "no memory"), ("StageFailed", "no memory")),
    (ConnectionLost("ws://lab", "it closed", 1012), ("ws://lab", "it closed")),
    (Unauthorized("ws://lab", 401, "not known"), ("ws://lab", 401, "not known")),
    (NotPermitted("publish", "replace the state"), ("publish", "replace the state")),
    (SessionsNotListed("ws://lab", "it answers HTTP 426"), ("ws://lab", "HTTP 426")),
    (StateNotFetched("ws://lab", "it is damaged"), ("fetched from ws://lab", "damaged")),
    (UntrustedPeer("wss://lab", "expired"), ("wss://lab", "expired")),
    (Redirected(302, "ws://other"), (302, "ws://other", "--server")),
    (UnusableFile("tokens", "it is empty"), ("tokens", "it is empty")),
    (PortInUse("127.0.0.1", 8765), ("127.0.0.1", 8765, "--port")),
]


@pytest.mark.parametrize(("error", "facts"), ERRORS, ids=lambda value: type(value).__name__)
def test_a_sentence_holds_the_facts_and_the_next_thing_to_try(
    error: SplitonnxError, facts: tuple[object, ...]
) -> None:
    check_sentence(error, *facts)


@pytest.mark.parametrize(
    "error",
    [
        RemoteProtocolError(EVIL),
        BundleMismatch(EVIL, "here", EVIL),
        RemoteFault(EVIL, EVIL),
        ConnectionLost("ws://lab", EVIL),
        Unauthorized("ws://lab", 401, EVIL),
        NotPermitted(EVIL, EVIL),
        UntrustedPeer("ws://lab", EVIL),
        Redirected(302, EVIL),
        MessageTooLarge("ws://lab", is_outgoing=True, reason=EVIL),
        MessageTooLarge("ws://lab", is_outgoing=False, reason=EVIL),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_other_side_wrote_cannot_break_the_line(error: SplitonnxError) -> None:
    assert str(error).isprintable()


def test_a_lost_worker_is_told_by_what_its_client_can_do() -> None:
    """Come back, send something smaller, or wait until the server is mended."""
    lost = str(WorkerLost("s", "it was ended"))
    again = str(WorkerLost("s", "it was ended", is_repeated=True))
    early = str(WorkerLost("s", "/opt/secret is missing", is_early=True))
    assert len({lost, again, early}) == 3
    assert "checkpoint" in lost
    assert "smaller" in again
    assert "--resume" in early
    assert "secret" not in early


def test_a_message_that_is_too_large_says_on_whose_side_the_limit_is() -> None:
    out = MessageTooLarge("ws://lab", is_outgoing=True, reason="9 bytes")
    back = MessageTooLarge("ws://lab", is_outgoing=False, reason="9 bytes")
    assert str(out) != str(back)
    for error in (out, back):
        check_sentence(error, "9 bytes", "--max-message-bytes")


def test_what_is_worth_trying_again_has_a_kind_of_its_own() -> None:
    final = (Unauthorized("x", 401, ""), UntrustedPeer("x", ""), Redirected(302, ""))
    assert not any(isinstance(error, ConnectionLost) for error in final)
    assert all(isinstance(error, ProtocolError) for error in final)
    assert ConnectionLost("x", "y").code is None


def test_two_errors_of_the_same_facts_are_two() -> None:
    assert StepsLost(1) != StepsLost(1)
    assert len({StepsLost(1), StepsLost(1)}) == 2
