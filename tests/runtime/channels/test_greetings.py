"""A greeting says what the client can do; the answer is checked before anything is done."""

from __future__ import annotations

import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import RemoteProtocolError, SharingNotPermitted
from splitonnx.messages import Welcome
from splitonnx.runtime.channels.greetings import (
    ResumePoint,
    SharingTerms,
    check_welcome,
    make_hello,
)
from tests.support import tiny

SESSION = "a" * 32
POINT = ResumePoint(origin="", start=0, step=7, kept=(5, 3))


def welcome(**settings: object) -> Welcome:
    usual = {"session": SESSION, "digest": "", "step": 7, "wires": {}}
    return Welcome(**{**usual, **settings})  # type: ignore[arg-type]


def check(answer: Welcome, *, can_share: bool, bundle: Bundle | None = None) -> SharingTerms:
    manifest = (bundle or tiny.sharing_bundle()).client.manifest
    return check_welcome(answer, SESSION, POINT, manifest=manifest, can_share=can_share)


@pytest.mark.parametrize("can_share", [False, True])
def test_a_greeting_says_whether_the_client_may_share(can_share: bool) -> None:
    hello = make_hello(
        tiny.split_bundle().client.manifest, SESSION, POINT,
        generation=2, is_open=True, can_repeat=False, can_share=can_share,
    )  # fmt: skip
    assert (hello.can_share, hello.generation, hello.step, hello.kept) == (can_share, 2, 7, (5, 3))


@pytest.mark.parametrize("step", [7, 5, 3])
def test_a_kept_step_is_accepted(step: int) -> None:
    found = check(welcome(step=step), can_share=False)
    assert found == SharingTerms()
    assert not found.joins


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"step": 4}, "no state of that step was kept"), ({"session": "b" * 32}, "it welcomed")],
)
def test_another_step_or_session_breaks_the_protocol(
    settings: dict[str, object], reason: str
) -> None:
    with pytest.raises(RemoteProtocolError, match=reason):
        check(welcome(**settings), can_share=True)


def test_a_server_gets_no_weights_that_the_user_does_not_permit() -> None:
    asked = welcome(policy="splitfed-v1", local_steps=4, rounds=9)
    with pytest.raises(SharingNotPermitted, match=r"'splitfed-v1'.*--share"):
        check(asked, can_share=False)
    found = check(asked, can_share=True)
    assert found == SharingTerms(policy="splitfed-v1", local_steps=4, rounds=9)
    assert found.joins


def test_a_bundle_that_does_not_declare_it_shares_nothing() -> None:
    asked = welcome(policy="splitfed-v1", local_steps=4)
    with pytest.raises(RemoteProtocolError, match="does not share"):
        check(asked, can_share=True, bundle=tiny.split_bundle())
