"""sessions, run as an operator runs it."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.queries import server_queries
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.edge.tokens import Tokens
from splitonnx.runtime.server.servers import Server
from splitonnx.runtime.wire.session_lists import SessionList
from tests.support import tiny
from tests.support.commands import Command
from tests.support.session_lists import make_entry, make_list


@pytest.fixture
def tokens(command: Command, tmp_path: Path) -> Path:
    """A folder with the server's file, and those of two clients with one role each."""
    for name, role in (("ann", "train"), ("otto", "operate")):
        out = command("token", name, "--token-file", tmp_path / "tokens", "--role", role)[1]
        (tmp_path / name).write_text(out)
        (tmp_path / name).chmod(0o600)
    return tmp_path


@pytest.fixture
def server(tokens: Path) -> Iterator[Server]:
    part = tiny.split_bundle().server
    assert part is not None
    with Server(part, port=0, tokens=Tokens.read(tokens / "tokens"), isolate=False) as running:
        yield running


def test_an_operator_sees_who_is_there_and_a_client_does_not(
    command: Command, server: Server, tokens: Path
) -> None:
    token = (tokens / "ann").read_text().strip()
    operator = ("--token-file", tokens / "otto")
    with Client(
        tiny.split_bundle().client, server.url, credentials=Credentials(token=token)
    ) as client:
        client.step(tiny.batch(0))
        out = command.succeed("sessions", server.url, *operator)
        for cell in (client.session[:8], "ann", "connected", "1 session; policy per-client"):
            assert cell in out
        found = json.loads(command.succeed("sessions", server.url, *operator, "--json"))
        (one,) = found["sessions"]
        assert (one["session"], one["owner"], one["step"]) == (client.session, "ann", 1)
        line = command.fail("sessions", server.url, "--token-file", tokens / "ann")
        assert "lacks the role 'operate'" in line
        assert "name its file with --token-file" in command.fail("sessions", server.url)
    assert "0 sessions" in command.succeed("sessions", server.url, *operator)


def test_where_no_server_is_one_line_says_so(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    line = command.fail("sessions", f"ws://127.0.0.1:{port}")
    assert f"connection to ws://127.0.0.1:{port} lost" in line


def test_json_holds_names_in_ascii(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "\x1b[31mö\x9b2J\u202e"
    found = make_list(make_entry(owner=evil))

    def answer(url: str, credentials: Credentials) -> SessionList:
        return found

    monkeypatch.setattr(server_queries, "fetch_sessions", answer)
    out = command.succeed("sessions", "ws://lab", "--json")
    assert out.replace("\n", "").isprintable()
    assert out.isascii()
    assert json.loads(out)["sessions"][0]["owner"] == evil
