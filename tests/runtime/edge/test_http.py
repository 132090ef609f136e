"""HTTP on the websockets' port: what every answer says, and what is read of a request."""

from __future__ import annotations

from http import HTTPStatus

import pytest
from websockets.datastructures import Headers
from websockets.http11 import Request

from splitonnx.runtime.edge.http import (
    STATUSES,
    WHY_BUSY,
    HttpRequest,
    Refusal,
    deny,
    deny_busy,
    make_response,
    read_request,
)
from splitonnx.runtime.edge.tokens import Identity, Role

TRAIN = frozenset({Role.TRAIN})


def test_an_answer_tells_its_length_is_not_kept_and_ends_the_connection() -> None:
    response = make_response(200, "text/plain", "grüß".encode())
    assert (response.status_code, response.reason_phrase) == (200, "OK")
    assert response.headers["Content-Length"] == "6"
    assert response.headers["Content-Type"] == "text/plain"
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Connection"] == "close"


def test_an_answer_s_own_headers_come_beside_or_in_place_of_the_usual_ones() -> None:
    headers = {"Cache-Control": "no-cache", "ETag": '"1"'}
    response = make_response(200, "text/html", b"", headers)
    assert response.headers.get_all("Cache-Control") == ["no-cache"]
    assert response.headers["ETag"] == '"1"'


@pytest.mark.parametrize(
    ("status", "header", "value"),
    [(401, "WWW-Authenticate", "Bearer"), (503, "Retry-After", "1")],
)
def test_who_has_to_do_something_first_is_told_what(status: int, header: str, value: str) -> None:
    assert make_response(status, "text/plain", b"").headers[header] == value
    assert header not in make_response(200, "text/plain", b"").headers


def test_a_refusal_is_a_sentence_on_a_line_of_its_own() -> None:
    response = deny(HTTPStatus.FORBIDDEN, "not from there")
    assert (response.status_code, response.body) == (403, b"not from there\n")
    assert response.headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize("refusal", WHY_BUSY)
def test_who_finds_no_room_is_told_to_try_again_later(refusal: Refusal) -> None:
    response = deny_busy(refusal)
    assert response.status_code == 503
    assert response.headers["Retry-After"] == "1"
    assert b"later" in (response.body or b"")


def test_every_status_that_is_told_before_a_websocket_is_an_error() -> None:
    assert all(400 <= status < 600 for status in STATUSES.values())


def test_reasons_label_a_metric_so_each_is_one_word_and_no_two_are_alike() -> None:
    values = [str(refusal) for refusal in Refusal]
    assert len(set(values)) == len(values) < 30
    assert all(value.isidentifier() for value in values)


def test_of_a_request_is_read_what_answers_hang_on() -> None:
    headers = Headers(
        [
            ("Upgrade", "websocket"),
            ("Accept-Encoding", "gzip"),
            ("Accept-Encoding", "br"),
            ("If-None-Match", '"a"'),
        ]
    )
    found = read_request(
        Request("/client/a.onnx", headers), "secret", Identity(owner="ann", roles=TRAIN)
    )
    assert found == HttpRequest(
        path="/client/a.onnx",
        token="secret",
        roles=TRAIN,
        owner="ann",
        is_upgrade=True,
        encodings="gzip,br",
        known_tags='"a"',
    )


def test_headers_that_a_request_lacks_are_empty() -> None:
    found = read_request(Request("/", Headers()), None, Identity(owner=""))
    assert found == HttpRequest(path="/", token=None)


def test_who_has_not_said_who_it_is_has_no_role() -> None:
    found = read_request(Request("/", Headers()), None, None)
    assert found == HttpRequest(path="/", token=None, roles=frozenset())
