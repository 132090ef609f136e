"""What a server answers to plain requests, and to whom."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitonnx.runtime.edge.http import HttpRequest
from splitonnx.runtime.edge.pages import read_pages
from splitonnx.runtime.edge.tokens import ALL_ROLES, Role
from splitonnx.runtime.server.metrics import Metrics
from splitonnx.runtime.server.operations.responders import Responder
from splitonnx.runtime.server.registries import Registry
from tests.support import tiny
from tests.support.registries import ANN, greet, open_registry

TOKEN = "0" * 43


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    tiny.split_bundle().save(tmp_path / "bundle")
    made = open_registry(tmp_path / "bundle" / "server")
    made.find(greet(ANN), "ann")
    return made


def make_responder(registry: Registry, *, is_stopping: bool = False) -> Responder:
    return Responder(registry, Metrics(), is_stopping=lambda: is_stopping, clock=lambda: 5.0)


@pytest.mark.parametrize(("is_stopping", "status"), [(False, "ok"), (True, "stopping")])
def test_anyone_learns_whether_the_server_is_well(
    registry: Registry, is_stopping: bool, status: str
) -> None:
    responder = make_responder(registry, is_stopping=is_stopping)
    answer = responder.respond(HttpRequest(path="/health", token=None, roles=frozenset()))
    assert answer is not None
    assert json.loads(answer.body) == {"status": status, "sessions": 1}


@pytest.mark.parametrize("path", ["/metrics", "/sessions"])
@pytest.mark.parametrize(
    ("token", "roles", "status"),
    [
        (None, frozenset(), 401),
        (TOKEN, frozenset({Role.TRAIN, Role.PUBLISH}), 403),
        (TOKEN, frozenset({Role.OPERATE}), 200),
        (None, ALL_ROLES, 200),
    ],
    ids=["no token", "another role", "an operator", "a server without tokens"],
)
def test_operations_are_for_the_role_of_operators(
    registry: Registry, path: str, token: str | None, roles: frozenset[Role], status: int
) -> None:
    answer = make_responder(registry).respond(HttpRequest(path=path, token=token, roles=roles))
    assert answer is not None
    assert answer.status == status
    assert (b"'operate'" in answer.body) == (status != 200)
    assert (ANN[:8].encode() in answer.body) == (status == 200 and path == "/sessions")


@pytest.mark.parametrize(("token", "shown"), [(TOKEN, ANN), (None, ANN[:8])])
def test_whole_ids_of_sessions_are_for_who_shows_a_token(
    registry: Registry, token: str | None, shown: str
) -> None:
    answer = make_responder(registry).respond(HttpRequest(path="/sessions", token=token))
    assert answer is not None
    assert answer.content_type == "application/json"
    (one,) = json.loads(answer.body)["sessions"]
    assert (one["session"], one["owner"]) == (shown, "ann")


def test_metrics_count_the_sessions(registry: Registry) -> None:
    answer = make_responder(registry).respond(HttpRequest(path="/metrics", token=None))
    assert answer is not None
    assert b"splitonnx_sessions 1.0" in answer.body
    assert b'splitonnx_rounds{what="closed"} 0.0' in answer.body


def test_other_paths_are_pages_if_there_are_any(registry: Registry, tmp_path: Path) -> None:
    responder = make_responder(registry)
    assert not responder.has_pages
    assert responder.respond(HttpRequest(path="/", token=None)) is None
    (tmp_path / "index.html").write_text("<p>hello")
    pages = Responder(registry, Metrics(), is_stopping=bool, pages=read_pages(tmp_path))
    assert pages.has_pages
    answer = pages.respond(HttpRequest(path="/", token=None, roles=frozenset()))
    assert answer is not None
    assert answer.body == b"<p>hello"
