"""Which connections come in: how many without a token, how many clients, how many long answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from unittest.mock import Mock

import pytest
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from splitonnx.errors import ConnectionLost
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.websockets import connect
from splitonnx.runtime.edge import admissions
from splitonnx.runtime.edge.admissions import SHORT_ANSWER, Admission
from splitonnx.runtime.edge.http import HttpRequest, HttpResponse, LaterResponse, Refusal
from splitonnx.runtime.edge.tokens import Identity
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.wire.close_codes import BUSY
from tests.support.echoes import Echo, dial, know_sesame, read_close, read_to_end, shake
from tests.support.event_loops import LOOPS

SESAME = Credentials(token="open sesame")
ALI, BEN, NOBODY = Identity(owner="ali"), Identity(owner="ben"), Identity(owner="")


class Recorded:
    """A connection that notes what becomes of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.identity: Identity | None = None
        self.refused: list[Refusal] = []
        self.answers: list[int] = []
        self.transport = Mock(asyncio.BaseTransport)
        self.transport.get_extra_info.return_value = None  # no certificate

    @property
    def owner(self) -> str | None:
        return None if self.identity is None else self.identity.owner

    def become_client(self, identity: Identity) -> None:
        self.identity = identity

    def wait_for_answer(self, size: int) -> None:
        self.answers.append(size)

    def refuse(self, refusal: Refusal, code: int, reason: str) -> None:
        self.refused.append(refusal)


class Arrivals:
    """An admission, and what it told of those it refused."""

    def __init__(self, *, is_open: bool = False, page: bytes | None = None, **limits: int) -> None:
        self.told: list[tuple[Refusal, str]] = []
        self.page = page
        self.most: int | None = None  # bytes of a page that takes time to make
        self.admission = Admission(
            Limits(**limits),
            authorize=None if is_open else know_sesame,
            respond=self._respond,
            origins=frozenset(),
            on_refusal=lambda refusal, name: self.told.append((refusal, name)),
            has_tls=False,
            has_pages=False,
            host="127.0.0.1",
        )

    def _respond(self, request: HttpRequest) -> HttpResponse | LaterResponse | None:
        if self.page is None:
            return None
        made = HttpResponse(200, "text/html", self.page)
        if self.most is None:
            return made

        async def make() -> HttpResponse:
            return made

        return LaterResponse(make=make, most=self.most)

    def enter(self, *names: str) -> list[Recorded]:
        connections = [Recorded(name) for name in names]
        for connection in connections:
            self.admission.enter(connection)
        return connections

    def ask(self, connection: Recorded, method: str = "GET", **headers: str) -> int | None:
        request = Request("/", Headers(Host="127.0.0.1", **headers), method)
        response = self._answer(connection, request)
        return None if response is None else response.status_code

    def read(self, connection: Recorded, method: str = "GET") -> bytes:
        request = Request("/", Headers(Host="127.0.0.1"), method)
        response = self._answer(connection, request)
        assert response is not None
        return bytes(response.body)

    def _answer(self, connection: Recorded, request: Request) -> Response | None:
        response = self.admission.answer(connection, request)
        if not isinstance(response, Awaitable):
            return response
        made = response

        async def wait() -> Response:
            return await made

        return asyncio.run(wait())


def test_with_one_too_many_the_one_that_waited_longest_is_sent_away() -> None:
    arrivals = Arrivals(unauthenticated=2)
    first, second, third = arrivals.enter("first", "second", "third")
    assert first.refused == [Refusal.TOO_MANY_UNAUTHENTICATED]
    assert second.refused == third.refused == []


def test_who_showed_a_token_or_left_counts_as_unauthenticated_no_longer() -> None:
    arrivals = Arrivals(unauthenticated=2)
    first, second = arrivals.enter("first", "second")
    assert arrivals.admission.admit(first, ALI) is None
    assert first.identity == ALI
    arrivals.admission.leave(second)
    others = arrivals.enter("third", "fourth")
    assert [c.refused for c in (first, second, *others)] == [[], [], [], []]


def test_there_are_no_more_clients_than_the_limit_until_one_leaves() -> None:
    arrivals = Arrivals(clients=1)
    first, second = arrivals.enter("first", "second")
    assert arrivals.admission.admit(first, ALI) is None
    assert arrivals.admission.admit(second, BEN) is Refusal.TOO_MANY_CLIENTS
    assert second.identity is None
    assert arrivals.told == [(Refusal.TOO_MANY_CLIENTS, "second")]
    arrivals.admission.leave(first)
    assert arrivals.admission.admit(second, BEN) is None


def test_there_are_no_more_clients_of_one_owner_than_the_limit() -> None:
    arrivals = Arrivals(clients_per_token=1)
    first, second, third = arrivals.enter("first", "second", "third")
    assert arrivals.admission.admit(first, ALI) is None
    assert arrivals.admission.admit(second, ALI) is Refusal.TOO_MANY_CLIENTS_OF_TOKEN
    assert arrivals.admission.admit(third, BEN) is None


def test_clients_without_a_name_are_bounded_in_all_alone() -> None:
    arrivals = Arrivals(clients_per_token=1)
    for connection in arrivals.enter("first", "second"):
        assert arrivals.admission.admit(connection, NOBODY) is None


def test_a_client_is_admitted_once() -> None:
    arrivals = Arrivals(clients=1)
    (connection,) = arrivals.enter("first")
    assert arrivals.admission.admit(connection, ALI) is None
    assert arrivals.admission.admit(connection, BEN) is None
    assert connection.identity == ALI


def test_a_token_in_the_header_admits_and_a_wrong_one_is_refused() -> None:
    arrivals = Arrivals()
    first, second, third = arrivals.enter("first", "second", "third")
    upgrade = {"Upgrade": "websocket"}
    assert arrivals.ask(first, Authorization="Bearer open sesame", **upgrade) is None
    assert first.identity == ALI
    assert arrivals.ask(second, Authorization="Bearer closed", **upgrade) == 401
    assert arrivals.told == [(Refusal.WRONG_TOKEN, "second")]
    assert arrivals.ask(third, **upgrade) is None
    assert third.identity is None


def test_a_client_for_whom_there_is_no_room_is_answered_503() -> None:
    arrivals = Arrivals(is_open=True, clients=1)
    first, second = arrivals.enter("first", "second")
    assert arrivals.ask(first, Upgrade="websocket") is None
    assert arrivals.ask(second, Upgrade="websocket") == 503


def test_long_answers_are_bounded_together_and_get_time(monkeypatch: pytest.MonkeyPatch) -> None:
    size = SHORT_ANSWER + 1
    monkeypatch.setattr(admissions, "ANSWERS_BYTES", 2 * size)
    arrivals = Arrivals(page=bytes(size))
    first, second, third = arrivals.enter("first", "second", "third")
    assert [arrivals.ask(c) for c in (first, second, third)] == [200, 200, 503]
    assert [c.answers for c in (first, second, third)] == [[size], [size], []]
    assert arrivals.told == [(Refusal.TOO_MANY_ANSWERS, "third")]
    assert arrivals.ask(third, "HEAD") == 200  # it has no body
    arrivals.admission.leave(first)
    assert arrivals.ask(third) == 200


def test_short_answers_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admissions, "ANSWERS_BYTES", 0)
    arrivals = Arrivals(page=bytes(SHORT_ANSWER))
    (connection,) = arrivals.enter("first")
    assert arrivals.ask(connection) == 200
    assert connection.answers == []


def test_an_answer_that_takes_time_to_make_has_time_and_room_in_advance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admissions, "ANSWERS_BYTES", 2000)
    arrivals = Arrivals(page=b"late")
    arrivals.most = 1000
    first, second, third = arrivals.enter("first", "second", "third")
    assert [arrivals.read(c) for c in (first, second)] == [b"late", b"late"]
    assert [c.answers for c in (first, second)] == [[1000], [1000]]
    assert arrivals.ask(third) == 503
    assert arrivals.told == [(Refusal.TOO_MANY_ANSWERS, "third")]
    arrivals.admission.leave(second)
    assert arrivals.ask(third, "HEAD") == 200
    arrivals.admission.leave(third)
    assert arrivals.read(third, "HEAD") == b""


def test_without_a_descriptor_one_that_waits_makes_room() -> None:
    arrivals = Arrivals()
    first, second = arrivals.enter("first", "second")
    arrivals.admission.quota.on_scarce()
    assert (first.refused, second.refused) == ([Refusal.TOO_MANY_FILES], [])
    assert arrivals.told == [(Refusal.TOO_MANY_FILES, "somebody")]


# --- over sockets -----------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.usefixtures("event_loop")
@pytest.mark.parametrize("event_loop", LOOPS, indirect=True)
def test_of_too_many_without_a_token_the_one_that_waited_longest_goes() -> None:
    limits = Limits(unauthenticated=2)
    with (
        Echo(authorize=know_sesame, limits=limits) as echo,
        dial(echo.port) as first,
        dial(echo.port) as second,
        dial(echo.port) as third,
    ):
        shake(second)
        shake(third)
        assert b" 503 " in read_to_end(first)
        transport = connect(echo.url, credentials=SESAME)
        assert read_close(second) == 1013
        transport.send([b"still here"])
        assert transport.receive() == b"still here"
        transport.close()


@pytest.mark.alone
@pytest.mark.usefixtures("event_loop")
@pytest.mark.parametrize("event_loop", LOOPS, indirect=True)
def test_with_too_many_clients_one_more_is_told_to_come_later() -> None:
    with Echo(authorize=know_sesame, limits=Limits(clients=1)) as echo:
        first = connect(echo.url, credentials=SESAME)
        with pytest.raises(ConnectionLost, match="too many clients") as caught:
            connect(echo.url, credentials=SESAME)
        assert caught.value.code == 503
        second = connect(echo.url)
        second.send([b"open sesame"])
        with pytest.raises(ConnectionLost, match="full") as caught:
            second.receive()
        assert caught.value.code == BUSY
        first.send([b"hello"])
        assert first.receive() == b"hello"
        first.close()
