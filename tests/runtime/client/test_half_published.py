"""An outcome is both halves' or neither's: what a client says to a server that may have published.

``runtime/js/tests/hostile_servers.test.ts`` holds the client in JavaScript to the same.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from splitonnx.bundles import PartyBundle
from splitonnx.errors import (
    BundleError,
    ConnectionLost,
    NotSaved,
    RemoteProtocolError,
    SplitonnxError,
    StateNotFinite,
)
from splitonnx.messages import Bye, Save, Saved, Unsaved
from splitonnx.runtime.client.clients import Client
from tests.support import tiny
from tests.support.tiny_servers import TinyServer


def lose_the_answer(answer: Saved) -> Saved:
    raise ConnectionLost("the server", "it closed")


def lie(answer: Saved) -> Saved:
    return Saved(session=answer.session, step=7)


def refuse(answer: Saved) -> Unsaved:
    return Unsaved(session=answer.session, step=answer.step, reason="no room")


@pytest.mark.parametrize(
    ("saved", "error"),
    [(lose_the_answer, ConnectionLost), (lie, RemoteProtocolError), (refuse, NotSaved)],
)
def test_a_server_that_may_have_published_is_not_told_good_bye(
    saved: object, error: type[SplitonnxError], tmp_path: Path
) -> None:
    bundle = tiny.split_bundle()
    bundle.client.save(tmp_path / "client")
    server = TinyServer(bundle=bundle, saved=saved)  # type: ignore[arg-type]
    with Client(tmp_path / "client", server.dial, give_up_after=0) as client:
        client.step(tiny.batch(1))
        with pytest.raises(error):
            client.save()
    assert any(isinstance(message, Save) for message in server.heard)
    assert not any(isinstance(message, Bye) for message in server.heard)


def test_a_server_that_published_is_told_good_bye_once_the_client_has_too(tmp_path: Path) -> None:
    server = TinyServer(bundle=tiny.split_bundle())
    server.bundle.client.save(tmp_path / "client")
    with Client(tmp_path / "client", server.dial) as client:
        client.step(tiny.batch(1))
        client.save()
    assert isinstance(server.heard[-1], Bye)
    assert PartyBundle.load(tmp_path / "client").step == 1


def test_infinite_weights_are_nobody_s_outcome(tmp_path: Path) -> None:
    server = TinyServer(bundle=tiny.split_bundle(), gradient=100.0)
    server.bundle.client.save(tmp_path / "client")
    with Client(tmp_path / "client", server.dial) as client:
        data = tiny.batch(1)
        client.step({**data, "x": data["x"] * 1000}, learning_rate=3e38)
        with pytest.raises(StateNotFinite):
            client.save()
    assert not any(isinstance(message, Save) for message in server.heard)


def test_a_part_in_memory_is_refused_before_the_server_publishes_its_half() -> None:
    server = TinyServer(bundle=tiny.split_bundle())
    with Client(server.bundle.client, server.dial) as client:
        client.step(tiny.batch(1))
        with pytest.raises(BundleError, match="no folder to save"):
            client.save()
    assert not any(isinstance(message, Save) for message in server.heard)
