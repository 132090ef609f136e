"""Requests at the server's edge: which are answered, to whom, and how many of one owner come in."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from splitonnx import Client, Server
from splitonnx.bundles import Bundle
from splitonnx.errors import ConnectionLost, NotPermitted, NotSaved
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.websockets import WebSocketTransport, connect
from splitonnx.runtime.edge import connections
from splitonnx.runtime.edge.http import Refusal
from splitonnx.runtime.edge.tokens import Identity, Role, Tokens, add_token
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.wire.close_codes import BUSY
from tests.support.echoes import PING, Echo, dial, frame, know_sesame, read_to_end, shake
from tests.support.zoo import ZOO

DATA = ZOO["chain"].data(24)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cut(ZOO["chain"].build(), at="act1", tail_at="act3").save(tmp_path / "bundle")
    return tmp_path / "bundle"


@contextmanager
def serving(folder: Path, *roles: Role) -> Iterator[tuple[Server, Credentials]]:
    """Serve with tokens, and give a token with some roles, ana's."""
    token = add_token(folder / "tokens", "ana", roles)
    with Server(folder / "server", port=0, tokens=Tokens.read(folder / "tokens")) as server:
        yield server, Credentials(token=token)


def ask(
    port: int, path: str, *, method: str = "GET", host: str = "127.0.0.1", token: str | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Make a request by hand, and read to the connection's end."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    with dial(port) as connection:
        connection.sendall(("\r\n".join([*lines, "", ""])).encode())
        head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    return int(first.split()[1]), dict(line.split(": ", 1) for line in rest), body


# --- how many come in ---------------------------------------------------------------------------


def know_names(token: str) -> Identity:
    """Know every token, as its owner's name."""
    return Identity(owner=token)


def open_as(echo: Echo, name: str) -> WebSocketTransport:
    return connect(echo.url, credentials=Credentials(token=name))


def test_one_owner_cannot_take_every_connection() -> None:
    limits = Limits(clients=3, clients_per_token=2)
    with Echo(authorize=know_names, limits=limits) as echo, ExitStack() as stack:
        mine = [open_as(echo, "eve") for _ in range(2)]
        for transport in mine:
            stack.callback(transport.close)
        with pytest.raises(ConnectionLost, match="of this token's owner") as caught:
            open_as(echo, "eve")
        assert caught.value.code == 503
        echo.expect(Refusal.TOO_MANY_CLIENTS_OF_TOKEN)
        late = connect(echo.url)  # whose token comes as a message
        stack.callback(late.close)
        late.send([b"eve"])
        with pytest.raises(ConnectionLost) as caught:
            late.receive()
        assert caught.value.code == BUSY
        other = open_as(echo, "ana")
        stack.callback(other.close)
        other.send([b"hello"])
        assert other.receive() == b"hello"
        with pytest.raises(ConnectionLost, match="too many clients;"):
            open_as(echo, "ben")


def test_a_place_of_an_owner_s_is_free_again_when_one_leaves() -> None:
    with Echo(authorize=know_names, limits=Limits(clients_per_token=1)) as echo:
        for _ in range(3):
            first = open_as(echo, "eve")
            first.send([b"hello"])
            assert first.receive() == b"hello"
            first.close()
            assert echo.ended.get(timeout=20)


def test_who_has_no_name_is_not_counted_as_one_owner() -> None:
    with Echo(limits=Limits(clients_per_token=1)) as echo, ExitStack() as stack:
        for _ in range(3):
            transport = connect(echo.url)
            stack.callback(transport.close)
            transport.send([b"hello"])
            assert transport.receive() == b"hello"


def test_by_default_one_owner_gets_a_share_of_connections_and_sessions() -> None:
    limits = Limits()
    assert limits.clients_per_token <= limits.clients / 4
    assert limits.sessions_per_token <= limits.sessions / 4


# --- roles --------------------------------------------------------------------------------------


def test_without_the_role_publish_the_newest_state_stays_and_a_checkpoint_is_kept(
    folder: Path,
) -> None:
    with (
        serving(folder, Role.TRAIN) as (server, credentials),
        Client(folder / "client", server.url, credentials=credentials, threads=1) as client,
    ):
        client.fit(DATA, batch_size=8, checkpoint_every=2)
        with pytest.raises(NotSaved, match=r"role 'publish'.*step 3 is kept as a checkpoint"):
            client.save()
        assert (folder / "server" / "sessions" / client.session / "3.safetensors").exists()
    assert Bundle.load(folder).server is not None
    assert not (folder / "server" / "state.safetensors").exists()


def test_with_the_role_publish_it_is_replaced(folder: Path) -> None:
    with (
        serving(folder, Role.TRAIN, Role.PUBLISH) as (server, credentials),
        Client(folder / "client", server.url, credentials=credentials, threads=1) as client,
    ):
        client.fit(DATA, batch_size=8, save=True)
    assert (folder / "server" / "state.safetensors").exists()


def test_without_the_role_train_no_session_opens_and_the_model_is_not_given_out(
    folder: Path,
) -> None:
    token = add_token(folder / "tokens", "ana", [Role.OPERATE, Role.PUBLISH])
    tokens = Tokens.read(folder / "tokens")
    with Server(folder / "server", port=0, tokens=tokens, client=folder / "client") as server:
        with pytest.raises(NotPermitted, match=r"may not open a session.*role 'train'"):
            Client(folder / "client", server.url, credentials=Credentials(token=token), threads=1)
        assert ask(server.port, "/client/manifest.json", token=token)[0] == 403
        assert ask(server.port, "/metrics", token=token)[0] == 200


def test_metrics_want_the_role_operate(folder: Path) -> None:
    with serving(folder, Role.TRAIN) as (server, credentials):
        assert ask(server.port, "/metrics")[0] == 401
        assert ask(server.port, "/metrics", token=credentials.token)[0] == 403
    with serving(folder) as (server, credentials):  # no roles in the line: all of them
        assert ask(server.port, "/metrics", token=credentials.token)[0] == 200


def test_a_token_that_comes_as_a_message_has_its_roles(folder: Path) -> None:
    from splitonnx.messages import Fault, Hello, Login, decode_message, encode_message
    from splitonnx.runtime.wire.protocols import list_wires

    manifest = Bundle.load(folder).client.manifest
    hello = Hello(digest=manifest.digest, session="5" * 32, step=0, wires=list_wires(manifest))
    with serving(folder, Role.OPERATE) as (server, credentials):
        transport = connect(server.url)
        transport.send(encode_message(Login(token=credentials.token or "")))
        transport.send(encode_message(hello))
        answer, _ = decode_message(transport.receive())
        assert isinstance(answer, Fault)
        assert (answer.code, answer.subject) == ("NotPermitted", "train")
        transport.close()


# --- hosts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/metrics", "/client/manifest.json", "/"])
def test_a_server_without_locks_is_not_read_under_a_name_of_somebody_else_s(
    folder: Path, path: str
) -> None:
    (folder / "web").mkdir()
    (folder / "web" / "index.html").write_text("a page")
    with Server(
        folder / "server", port=0, client=folder / "client", web=folder / "web",
        origins=["https://lab.example:8443"],
    ) as server:  # fmt: skip
        for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", "x"):
            status, _, body = ask(server.port, path, host=host)
            assert (status, b"--origin" in body) == (403, True)
        for host in (
            "127.0.0.1",
            f"localhost:{server.port}",
            "[::1]:1",
            "LOCALHOST",
            "lab.example",
        ):
            assert ask(server.port, path, host=host)[0] == 200


def test_a_server_with_tokens_may_be_asked_by_any_name(folder: Path) -> None:
    with serving(folder) as (server, credentials):
        assert ask(server.port, "/health", host="lab.example")[0] == 200
        assert ask(server.port, "/metrics", host="lab.example", token=credentials.token)[0] == 200


def test_a_program_may_open_a_websocket_by_any_name() -> None:
    with Echo() as echo, dial(echo.port) as connection:
        lines = [
            "GET / HTTP/1.1", "Host: gpu-box.lan", "Upgrade: websocket", "Connection: Upgrade",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13", "", "",
        ]  # fmt: skip
        connection.sendall("\r\n".join(lines).encode())
        assert connection.recv(12) == b"HTTP/1.1 101"


# --- methods and targets ------------------------------------------------------------------------


def test_head_gets_the_head_of_what_get_would(folder: Path) -> None:
    with serving(folder) as (server, credentials):
        for path, token, status in [
            ("/health", None, 200),
            ("/metrics", None, 401),
            ("/metrics", credentials.token, 200),
            ("/", credentials.token, 426),
        ]:
            found, headers, body = ask(server.port, path, method="HEAD", token=token)
            assert (found, body) == (status, b""), path
            assert "Content-Length" in headers
        length = ask(server.port, "/health", method="HEAD")[1]["Content-Length"]
        assert int(length) == len(ask(server.port, "/health")[2]) > 0


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get", "PRI"])
def test_other_methods_are_not_answered(method: str) -> None:
    with Echo() as echo:
        status, headers, _ = ask(echo.port, "/health", method=method)
        assert (status, headers["Allow"]) == (405, "GET, HEAD")


def test_python_s_own_client_of_http_can_ask_for_a_head() -> None:
    with Echo() as echo:
        connection = http.client.HTTPConnection("127.0.0.1", echo.port, timeout=20)
        connection.request("HEAD", "/health")
        response = connection.getresponse()
        assert (response.status, response.read()) == (200, b"")
        connection.close()


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n", b" 400 "),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nAuthorization: x\r\nAuthorization: y\r\n\r\n",
         b" 400 "),
        (b"GET http://127.0.0.1/health HTTP/1.1\r\nHost: evil.example\r\n\r\n", b" 403 "),
        (b"GET http://evil.example/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b" 426 "),
        (b"GET /%68ealth HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b" 426 "),
        (b"GET /./health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b" 426 "),
        (b"GET /health HTTP/1.0\r\n\r\n", b" 200 "),
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: 100-continue\r\n\r\n", b" 200 "),
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
         b""),
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 3\r\n\r\nabc", b""),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b" 414 "),
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n Folded: x\r\n\r\n", b""),
        (b"GET /health\r\n\r\n", b""),
    ],
    ids=["two hosts", "two tokens", "absolute, other host", "absolute", "escaped", "dots",
         "HTTP/1.0", "expect", "chunked", "a body", "a long path", "folded", "HTTP/0.9"],
)  # fmt: skip
def test_odd_requests_are_answered_once_or_not_at_all(request_: bytes, expected: bytes) -> None:
    with Echo() as echo, dial(echo.port) as connection:
        connection.sendall(request_)
        answer = read_to_end(connection)
        assert answer.count(b"HTTP/1.1 ") == bool(expected)
        assert expected in answer.partition(b"\r\n")[0] + b" "


def test_a_second_request_behind_the_first_is_not_answered() -> None:
    with Echo() as echo, dial(echo.port) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 2)
        assert read_to_end(connection).count(b"HTTP/1.1 ") <= 1


# --- those who do not read ----------------------------------------------------------------------


def test_who_does_not_take_its_reply_is_cut_off_in_spite_of_pings() -> None:
    limits = Limits(message_seconds=3, idle_seconds=3)
    with Echo(limits=limits) as echo, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        connection.settimeout(20)
        connection.connect(("127.0.0.1", echo.port))
        shake(connection)
        connection.sendall(frame(bytes(8 << 20)) + frame(b"", PING))
        echo.expect(Refusal.REPLY_TOO_SLOW)
        assert "did not take a reply within 3 s" in echo.ended.get(timeout=20)


def test_who_does_not_take_a_long_answer_steadily_is_cut_off(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "ANSWER_SECONDS", 1.0)
    size = 24 << 20
    (folder / "web").mkdir()
    (folder / "web" / "index.html").write_bytes(bytes(size))
    with (
        Server(folder / "server", port=0, web=folder / "web") as server,
        dial(server.port) as connection,
    ):
        connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        while True:  # refusals are counted, and this one comes by itself
            text = ask(server.port, "/metrics")[2].decode()
            if 'splitonnx_refusals_total{reason="ReplyTooSlow"} 1.0' in text:
                break
        assert len(read_to_end(connection)) < size


def test_what_stands_behind_a_question_mark_of_an_address_is_not_told() -> None:
    with pytest.raises(ConnectionLost) as caught:
        connect("ws://127.0.0.1:1/path?token=secret")
    assert "secret" not in str(caught.value)
    assert "127.0.0.1:1/path" in str(caught.value)


def test_a_known_owner_trains_as_before(folder: Path) -> None:
    with (
        serving(folder) as (server, credentials),
        Client(folder / "client", server.url, credentials=credentials, threads=1) as client,
    ):
        history = client.fit(DATA, batch_size=8)
        assert np.isfinite([record.loss for record in history.steps]).all()
    with Echo(authorize=know_sesame) as echo:
        transport = connect(echo.url, credentials=Credentials(token="open sesame"))
        transport.close()
