"""Web pages on the server's port: what is given out, to whom, and what is not."""

from __future__ import annotations

import gzip
import http.client
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

import pytest

from splitonnx import Server
from splitonnx.errors import UsageError
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.edge import admissions, pages
from splitonnx.runtime.edge.http import HttpRequest
from splitonnx.runtime.edge.pages import read_pages
from splitonnx.runtime.edge.tokens import Tokens, add_token
from splitonnx.runtime.limits import Limits
from tests.support.echoes import dial, shake
from tests.support.event_loops import LOOPS

MODEL = Path(__file__).parents[3] / "examples" / "digits.onnx"
HEAD_ENDS = "/block1/Relu_output_0"
PAGE = b"<!doctype html><title>a page</title>" * 40
LONG = 24 << 20
"""Bytes, more than two sockets keep in between."""
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cut") / "bundle"
    cut(MODEL, at=HEAD_ENDS, client_target="portable").save(folder)
    return folder


@pytest.fixture
def web(tmp_path: Path) -> Path:
    """A page's folder: a file in a folder of its own, a packed one, a hidden one."""
    folder = tmp_path / "web"
    (folder / "parts").mkdir(parents=True)
    (folder / "index.html").write_bytes(PAGE)
    (folder / "index.html.gz").write_bytes(gzip.compress(PAGE))
    (folder / "parts" / "run.wasm").write_bytes(bytes(LONG))
    (folder / ".secret").write_text("secret")
    (tmp_path / "outside.txt").write_text("secret")
    return folder


def get(
    server: Server, path: str, headers: Mapping[str, str] = NO_HEADERS
) -> tuple[int, dict[str, str], bytes]:
    """Ask for a path, as it is."""
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.putrequest("GET", path, skip_accept_encoding=True)
        for item in headers.items():
            connection.putheader(*item)
        connection.endheaders()
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def test_a_page_and_all_its_files_come_from_the_server_s_port(bundle: Path, web: Path) -> None:
    with Server(bundle / "server", port=0, web=web) as server:
        status, headers, body = get(server, "/")
        assert (status, body) == (200, PAGE)
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert "connect-src 'self'" in headers["Content-Security-Policy"]
        assert get(server, "/index.html?x=1")[2] == PAGE
        status, headers, body = get(server, "/parts/run.wasm")
        assert (status, headers["Content-Type"]) == (200, "application/wasm")
        assert body == bytes(LONG)
        assert get(server, "/health")[0] == 200


@pytest.mark.usefixtures("event_loop")
@pytest.mark.parametrize("event_loop", LOOPS, indirect=True)
def test_a_long_answer_may_take_longer_than_a_handshake(bundle: Path, web: Path) -> None:
    with (
        Server(bundle / "server", port=0, web=web, limits=Limits(handshake_seconds=0.05)) as server,
        dial(server.port) as client,
    ):
        client.sendall(b"GET /parts/run.wasm HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        wait_until_refused(server.port)  # by then as much time has gone for the other
        received = b"".join(iter(lambda: client.recv(1 << 20), b""))
        assert received.endswith(b"\r\n\r\n" + bytes(LONG))


@pytest.mark.usefixtures("event_loop")
@pytest.mark.parametrize("event_loop", LOOPS, indirect=True)
def test_no_more_long_answers_wait_than_there_is_room_for(
    bundle: Path, web: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admissions, "ANSWERS_BYTES", 2 * LONG)
    with Server(bundle / "server", port=0, web=web) as server, ExitStack() as waiting:
        for _ in range(2):
            client = waiting.enter_context(dial(server.port))
            client.sendall(b"GET /parts/run.wasm HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert client.recv(15) == b"HTTP/1.1 200 OK"
        assert get(server, "/parts/run.wasm")[0] == 503
        assert get(server, "/")[0] == 200
        while client.recv(1 << 20):
            pass
        client.close()
        assert get(server, "/parts/run.wasm")[0] == 200


def wait_until_refused(port: int) -> None:
    """Come without a word, and stay until the server has waited long enough."""
    with dial(port) as client:
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_packed_file_goes_to_those_who_unpack(bundle: Path, web: Path) -> None:
    with Server(bundle / "server", port=0, web=web) as server:
        _, headers, body = get(server, "/", {"Accept-Encoding": "br, gzip;q=0.5"})
        assert headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(body) == PAGE
        for others in ({}, {"Accept-Encoding": "br"}, {"Accept-Encoding": "gzip;q=0"}):
            assert get(server, "/", others)[2] == PAGE


def test_who_has_a_file_already_is_told_so(bundle: Path, web: Path) -> None:
    with Server(bundle / "server", port=0, web=web) as server:
        tag = get(server, "/")[1]["ETag"]
        assert get(server, "/", {"If-None-Match": f'"other", {tag}'})[::2] == (304, b"")
        assert get(server, "/", {"If-None-Match": '"other"'})[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/../outside.txt",
        "/%2e%2e/outside.txt",
        "/parts/../../outside.txt",
        "//etc/passwd",
        "/.secret",
        "/parts",
        "/parts/",
        "/index.html.gz",
        "/INDEX.HTML",
        "/client/manifest.json",
        "/%ff%00",
    ],
)
def test_what_is_no_file_of_the_page_is_not_there(bundle: Path, web: Path, path: str) -> None:
    with Server(bundle / "server", port=0, web=web) as server:
        status, _, body = get(server, path)
        assert status == 426  # as before there were pages: only websockets are wanted there
        assert b"secret" not in body


def test_a_file_made_later_is_not_given_out(bundle: Path, web: Path) -> None:
    with Server(bundle / "server", port=0, web=web) as server:
        (web / "later.txt").write_text("later")
        (web / "index.html").write_text("later")
        assert get(server, "/later.txt")[0] == 426
        assert get(server, "/")[2] == PAGE


def test_the_client_s_part_wants_the_token_and_the_page_does_not(
    bundle: Path, web: Path, tmp_path: Path
) -> None:
    token = add_token(tmp_path / "tokens", "ana")
    tokens = Tokens.read(tmp_path / "tokens")
    with Server(
        bundle / "server", port=0, web=web, client=bundle / "client", tokens=tokens
    ) as server:
        path = "/client/manifest.json"
        assert get(server, "/")[0] == 200
        assert get(server, path)[0] == 401
        assert get(server, path, {"Authorization": "Bearer wrong"})[0] == 401
        assert get(server, path, {"Authorization": f"Bearer {token}"})[0] == 200


def test_a_folder_without_a_page_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no index\.html.*make web"):
        read_pages(tmp_path)


@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_FILES", 2), ("MAX_FILE_BYTES", LONG - 1), ("MAX_BYTES", LONG)]
)
def test_a_folder_that_is_too_large_is_refused(
    web: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(pages, limit, value)
    with pytest.raises(UsageError, match="more than a server gives out"):
        read_pages(web)


@pytest.mark.parametrize(
    "target",
    [
        "../outside.txt",
        "/etc/passwd",
        ".secret",
        "parts/../../outside.txt",
        "../web/../outside.txt",
    ],
)
@pytest.mark.parametrize("name", ["link.txt", "parts/link.txt", "index.html.gz"])
def test_a_link_out_of_the_folder_is_refused(web: Path, name: str, target: str) -> None:
    aim = target if target.startswith("/") else str(web / target)
    (web / name).unlink(missing_ok=True)
    (web / name).symlink_to(aim)
    with pytest.raises(UsageError, match=r"is a link to a file that is not given out"):
        read_pages(web)


def test_a_link_within_the_folder_is_followed(web: Path) -> None:
    (web / "home.html").symlink_to("index.html")
    answer = read_pages(web).answer(HttpRequest(path="/home.html", token=None))
    assert answer is not None
    assert answer.body == PAGE


def test_what_is_no_regular_file_is_passed_over(web: Path) -> None:
    os.mkfifo(web / "pipe")
    (web / "device").symlink_to("/dev/zero")
    (web / "nowhere").symlink_to(web / "missing")
    assert read_pages(web).answer(HttpRequest(path="/pipe", token=None)) is None
    (web / "index.html").unlink()
    os.mkfifo(web / "index.html")
    with pytest.raises(UsageError, match=r"no index\.html"):
        read_pages(web)


def test_a_websocket_is_opened_where_a_page_lies(web: Path) -> None:
    found = read_pages(web)
    assert found.answer(HttpRequest(path="/", token=None)) is not None
    assert found.answer(HttpRequest(path="/", token=None, is_upgrade=True)) is None


def test_a_page_s_own_websocket_is_let_in(bundle: Path, web: Path) -> None:
    for folder, status in [(web, b" 101 "), (None, b" 403 ")]:
        with Server(bundle / "server", port=0, web=folder) as server, dial(server.port) as client:
            assert status in shake(client, "Origin: http://127.0.0.1")
