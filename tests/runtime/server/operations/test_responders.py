"""What a server answers to plain requests, and to whom."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from splitonnx.messages import Save
from splitonnx.runtime.edge.http import HttpRequest, HttpResponse, LaterResponse
from splitonnx.runtime.edge.pages import read_pages
from splitonnx.runtime.edge.tokens import DEFAULT_ROLES, Role
from splitonnx.runtime.scheduling.turns import Turns
from splitonnx.runtime.server.metrics import Metrics
from splitonnx.runtime.server.operations.responders import Responder
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.wire.saved_states import PIECE_BYTES, StateQuery, decode_description
from tests.support import tiny
from tests.support.registries import ANN, advance, greet, open_registry

TOKEN = "0" * 43


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    tiny.split_bundle().save(tmp_path / "bundle")
    made = open_registry(tmp_path / "bundle" / "server")
    made.find(greet(ANN), "ann")
    return made


def make_responder(
    registry: Registry, *, is_stopping: bool = False, storage: Turns | None = None
) -> Responder:
    return Responder(
        registry,
        Metrics(),
        is_stopping=lambda: is_stopping,
        storage=storage or Turns(),
        clock=lambda: 5.0,
    )


def ask(responder: Responder, request: HttpRequest) -> HttpResponse:
    answer = responder.respond(request)
    assert isinstance(answer, HttpResponse)
    return answer


@pytest.mark.parametrize(("is_stopping", "status"), [(False, "ok"), (True, "stopping")])
def test_anyone_learns_whether_the_server_is_well(
    registry: Registry, is_stopping: bool, status: str
) -> None:
    responder = make_responder(registry, is_stopping=is_stopping)
    answer = ask(responder, HttpRequest(path="/health", token=None, roles=frozenset()))
    assert json.loads(answer.body) == {"status": status, "sessions": 1}


@pytest.mark.parametrize("path", ["/metrics", "/sessions"])
@pytest.mark.parametrize(
    ("token", "roles", "status"),
    [
        (None, frozenset(), 401),
        (TOKEN, frozenset({Role.TRAIN, Role.PUBLISH}), 403),
        (TOKEN, frozenset({Role.OPERATE}), 200),
        (None, DEFAULT_ROLES, 200),
    ],
    ids=["no token", "another role", "an operator", "a server without tokens"],
)
def test_operations_are_for_the_role_of_operators(
    registry: Registry, path: str, token: str | None, roles: frozenset[Role], status: int
) -> None:
    answer = ask(make_responder(registry), HttpRequest(path=path, token=token, roles=roles))
    assert answer.status == status
    assert (b"'operate'" in answer.body) == (status != 200)
    assert (ANN[:8].encode() in answer.body) == (status == 200 and path == "/sessions")


@pytest.mark.parametrize(("token", "shown"), [(TOKEN, ANN), (None, ANN[:8])])
def test_whole_ids_of_sessions_are_for_who_shows_a_token(
    registry: Registry, token: str | None, shown: str
) -> None:
    answer = ask(make_responder(registry), HttpRequest(path="/sessions", token=token))
    assert answer.content_type == "application/json"
    (one,) = json.loads(answer.body)["sessions"]
    assert (one["session"], one["owner"]) == (shown, "ann")


def test_metrics_count_the_sessions(registry: Registry) -> None:
    answer = ask(make_responder(registry), HttpRequest(path="/metrics", token=None))
    assert b"splitonnx_sessions 1.0" in answer.body
    assert b'splitonnx_rounds{what="closed"} 0.0' in answer.body


def test_other_paths_are_pages_if_there_are_any(registry: Registry, tmp_path: Path) -> None:
    responder = make_responder(registry)
    assert not responder.has_pages
    assert responder.respond(HttpRequest(path="/", token=None)) is None
    (tmp_path / "index.html").write_text("<p>hello")
    pages = Responder(
        registry, Metrics(), is_stopping=bool, storage=Turns(), pages=read_pages(tmp_path)
    )
    assert pages.has_pages
    answer = ask(pages, HttpRequest(path="/", token=None, roles=frozenset()))
    assert answer.body == b"<p>hello"


# --- states -------------------------------------------------------------------------------------

STATE = StateQuery(session=ANN)


@pytest.mark.parametrize("query", [STATE, StateQuery(session=ANN, checksum="0" * 64)])
@pytest.mark.parametrize(
    ("token", "roles", "status", "reason"),
    [
        (None, frozenset(), 401, b"a token with the role 'fetch'"),
        (TOKEN, DEFAULT_ROLES, 403, b"a token with the role 'fetch'"),
        (None, DEFAULT_ROLES, 403, b"a server without tokens hands out no state"),
    ],
    ids=["no token", "every other role", "a server without tokens"],
)
def test_states_take_a_token_with_a_role_of_their_own(
    registry: Registry,
    query: StateQuery,
    token: str | None,
    roles: frozenset[Role],
    status: int,
    reason: bytes,
) -> None:
    answer = ask(
        make_responder(registry),
        HttpRequest(path=query.path, token=token, roles=roles, owner="ann"),
    )
    assert answer.status == status
    assert reason in answer.body


@pytest.mark.parametrize(("owner", "status"), [("ann", 200), ("bob", 404)])
def test_a_state_is_read_in_a_thread_for_its_owner(
    registry: Registry, owner: str, status: int
) -> None:
    session = registry.find(greet(ANN, generation=2), "ann")
    advance(registry, session, 3)
    registry.policy.save(Save(session=ANN, step=3, publish=True))
    roles = frozenset({Role.FETCH})
    request = HttpRequest(path=STATE.path, token=TOKEN, roles=roles, owner=owner)

    async def read() -> HttpResponse:
        storage = Turns()
        answer = make_responder(registry, storage=storage).respond(request)
        assert isinstance(answer, LaterResponse)
        assert answer.most == PIECE_BYTES
        made = await answer.make()
        storage.close()
        return made

    answer = asyncio.run(read())
    assert answer.status == status
    assert status != 200 or decode_description(answer.body).step == 3
