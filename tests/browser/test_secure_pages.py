"""The example's page over TLS, with the server's token, in headless Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme

from splitonnx import Server
from splitonnx.runtime.edge.tokens import Tokens, add_token
from splitonnx.runtime.wire.tls import make_server_tls
from tests.support.browsers import DIST, Screen
from tests.support.page_trainings import STEPS, TRAINED

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser


def test_a_page_over_tls_trains_over_tls_and_keeps_its_token_to_itself(
    browser: Browser, own: Path, tmp_path: Path
) -> None:
    certificate = tmp_path / "server.pem"
    trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
    token = add_token(tmp_path / "tokens", "ana")
    with (
        Server(
            own / "server",
            port=0,
            client=own / "client",
            web=DIST,
            threads=1,
            tls=make_server_tls(certificate, certificate),
            tokens=Tokens.read(tmp_path / "tokens"),
        ) as server,
        browser.new_context(ignore_https_errors=True) as context,
    ):
        page = context.new_page()
        asked: list[str] = []
        sockets: list[str] = []
        context.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: sockets.append(socket.url))
        screen = Screen(page, f"{server.url}/#token={token}")
        assert page.evaluate("[location.protocol, crossOriginIsolated]") == ["https:", True]
        screen.wait_for_status("Ready")
        screen.start(passes=1)
        screen.wait_for_status(TRAINED)
        assert screen.problems == []
        assert list(screen.losses()) == list(range(1, STEPS + 1))
    assert sockets == [f"{server.url}/"]
    origin = server.url.replace("wss", "https", 1)
    assert f"{origin}/client/manifest.json" in asked
    assert all(url.startswith(f"{origin}/") and token not in url for url in asked)
