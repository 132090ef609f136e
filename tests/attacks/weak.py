"""The weak points of the same review, as far as they show from outside."""

from __future__ import annotations

import http.client
import shutil
import socket
import threading
from contextlib import ExitStack, closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from websockets.exceptions import InvalidHandshake, WebSocketException

from splitonnx.codecs import decode_tensors
from tests.attacks.files import shorten, write_digits
from tests.attacks.models import Cut
from tests.attacks.processes import NotServed, Server, make_token
from tests.attacks.sessions import train
from tests.attacks.verdicts import Attack, Ground, Outcome
from tests.attacks.wires import Gone, Line, describe

DISK_BYTES = 2_000_000
FILES = 64
HOST = "evil.example"
LARGEST_RATE = 3e38


def _with_tokens(ground: Ground) -> tuple[Cut, Path, str, str]:
    cut = ground.digits.copy(ground.room())
    tokens = cut.bundle.parent / "tokens"
    ana, eve = (make_token(ground.checkout, name, tokens) for name in ("ana", "eve"))
    return cut, tokens, ana, eve


def crowd(ground: Ground) -> Outcome:
    """Open as many connections and sessions by one token as the server allows; then one comes."""
    cut, tokens, ana, eve = _with_tokens(ground)
    opened = sessions = 0
    with (
        Server(ground.checkout, cut.server, ("--token-file", tokens)) as server,
        ExitStack() as crowd,
    ):
        for _ in range(128):
            try:
                line = crowd.enter_context(Line(server.url, cut.client, eve))
                opened += 1
                sessions += describe(line.hello()) == "Welcome"
            except (WebSocketException, Gone, OSError):
                continue
        try:
            with Line(server.url, cut.client, ana) as honest:
                told = describe(honest.hello())
        except InvalidHandshake as error:
            told = str(error)
        except (Gone, OSError) as error:
            told = type(error).__name__
    return Outcome(
        seen=f"{opened} connections and {sessions} sessions of one token; another's: {told}",
        held=told == "Welcome",
    )


def disk(ground: Ground) -> Outcome:
    """Save session after session by one token, against a bound of bytes."""
    cut, tokens, _, eve = _with_tokens(ground)
    option = ("--max-disk-per-owner", DISK_BYTES)
    before = _measure(cut.server)
    told = []
    with Server(ground.checkout, cut.server, ("--token-file", tokens), option) as server:
        for _ in range(30):
            with Line(server.url, cut.client, eve) as line, suppress(Gone):
                line.hello()
                train(line, 1)
                told.append(describe(line.save(1)))
    grown = _measure(cut.server) - before
    known = ground.checkout.knows("--max-disk-per-owner")
    return Outcome(
        seen=f"{grown / 1e6:.1f} MB on disk by {len(told)} sessions; "
        f"{'refused: ' + str(told.count('Unsaved')) if known else 'there is no bound to be set'}",
        held=known and grown <= DISK_BYTES and "Saved" in told and "Unsaved" in told,
    )


def _measure(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rebinding(ground: Ground) -> Outcome:
    """Ask for the client's files and the metrics by a foreign name of this machine."""
    cut = ground.digits.copy(ground.room())
    statuses = {}
    with Server(ground.checkout, cut.server, ("--client", cut.client)) as server:
        for path in ("/metrics", "/client/manifest.json"):
            for host in (HOST, f"127.0.0.1:{server.port}"):
                with closing(http.client.HTTPConnection("127.0.0.1", server.port, 20)) as asking:
                    asking.request("GET", path, headers={"Host": host})
                    statuses[path, host == HOST] = asking.getresponse().status
    foreign = {path: status for (path, is_foreign), status in statuses.items() if is_foreign}
    own = {status for (_, is_foreign), status in statuses.items() if not is_foreign}
    return Outcome(
        seen=f"as {HOST}: {foreign}; as 127.0.0.1: {sorted(own)}",
        held=all(status >= 400 for status in foreign.values()) and own == {200},
    )


def learning_rate(ground: Ground) -> Outcome:
    """Train with the largest learning rate that there is, and publish."""
    cut = ground.digits.copy(ground.room())
    told = []
    with (
        Server(ground.checkout, cut.server) as server,
        Line(server.url, cut.client) as eve,
        suppress(Gone),
    ):
        eve.hello()
        told.append(train(eve, 3, value=1e3, rate=LARGEST_RATE))
        told.append(describe(eve.save(3)))
    state = cut.server / "state.safetensors"
    wild = 0
    if state.exists():
        tensors, _ = decode_tensors(state.read_bytes(), max_header=1 << 26)
        wild = sum(int((~np.isfinite(array)).sum()) for array in tensors.values())
    return Outcome(
        seen=f"answers: {', '.join(told)}; {wild:,} published values are not finite",
        held=not wild and told[-1:] != ["Saved"],
    )


def links(ground: Ground) -> Outcome:
    """Lay a link to a secret into the folder of web pages."""
    cut = ground.digits.copy(ground.room())
    web = cut.bundle.parent / "web"
    web.mkdir()
    (web / "index.html").write_text("<p>well</p>")
    (cut.bundle.parent / "secret").write_text("secret")
    (web / "notes.txt").symlink_to(cut.bundle.parent / "secret")
    try:
        with (
            Server(ground.checkout, cut.server, ("--web", web)) as server,
            closing(http.client.HTTPConnection("127.0.0.1", server.port, 20)) as asking,
        ):
            asking.request("GET", "/notes.txt")
            answer = asking.getresponse()
            leaked = b"secret" in answer.read()
    except NotServed as error:
        return Outcome(seen=shorten(str(error)), held=str(error).startswith("splitonnx: "))
    return Outcome(
        seen=f"HTTP {answer.status}, {'the secret' if leaked else 'no secret'}", held=not leaked
    )


def head(ground: Ground) -> Outcome:
    """Ask for a head, and look whether a body comes."""
    cut = ground.digits.copy(ground.room())
    request = b"HEAD /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    content = b""
    with (
        Server(ground.checkout, cut.server) as server,
        socket.create_connection(("127.0.0.1", server.port), 20) as asking,
    ):
        asking.sendall(request)
        with suppress(ConnectionResetError):
            while part := asking.recv(1 << 16):
                content += part
    start, _, body = content.partition(b"\r\n\r\n")
    return Outcome(
        seen=f"{start.splitlines()[0].decode() if start else 'nothing'}, {len(body)} bytes of body",
        held=not body and bool(start),
    )


def few_files(ground: Ground) -> Outcome:
    """Connect more often than the server may have open files, then as one client more."""
    cut = ground.digits.copy(ground.room())
    with Server(ground.checkout, cut.server, files=FILES) as server:
        with ExitStack() as crowd:
            for _ in range(3 * FILES):
                with suppress(OSError):
                    one = socket.create_connection(("127.0.0.1", server.port), 2)
                    crowd.enter_context(one)
            threading.Event().wait(3.0)  # for what the server has to say to that
        told = "refused"
        for _ in range(20):
            with suppress(OSError, Gone, WebSocketException):
                with Line(server.url, cut.client) as line:
                    told = describe(line.hello())
                break
        tracebacks, size = server.log.count("Traceback"), len(server.log)
        death = server.death(0.5)
    return Outcome(
        seen=f"{tracebacks} tracebacks, {size / 1000:.0f} kB of log; server: {death or 'lives'}; "
        f"one client later: {told}",
        held=not tracebacks and death is None and told == "Welcome",
    )


def deleted_folder(ground: Ground) -> Outcome:
    """Delete the folder that is served, then save."""
    cut = ground.digits.copy(ground.room())
    told = "none"
    with Server(ground.checkout, cut.server) as server, Line(server.url, cut.client) as line:
        line.hello()
        train(line, 1)
        shutil.rmtree(cut.server)
        with suppress(Gone):
            told = describe(line.save(1))
        made = cut.server.exists()
    return Outcome(
        seen=f"answer: {told}; the folder {'was made anew' if made else 'stays deleted'}",
        held=told != "Saved" and not made,
    )


class _Elsewhere(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.server.location)  # type: ignore[attr-defined]
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def redirect(ground: Ground) -> Outcome:
    """Answer a client by a redirect to another server."""
    cut = ground.digits.copy(ground.room())
    data = write_digits(cut.bundle.parent)
    with Server(ground.checkout, cut.server) as server:
        liar = ThreadingHTTPServer(("127.0.0.1", 0), _Elsewhere)
        liar.location = server.url  # type: ignore[attr-defined]
        thread = threading.Thread(target=liar.serve_forever, args=(0.05,))
        thread.start()
        ended = ground.checkout.run(
            "train", cut.client, "--server", f"ws://127.0.0.1:{liar.server_address[1]}",
            "--data", data, "--give-up-after", 5, seconds=60,
        )  # fmt: skip
        liar.shutdown()
        thread.join()
        liar.server_close()
    return Outcome(
        seen=shorten(ended.last_line) if ended.is_refusal else f"train: {ended.how}, elsewhere",
        held=ended.is_refusal,
    )


def role(ground: Ground) -> Outcome:
    """Publish by a token that may train alone."""
    cut = ground.digits.copy(ground.room())
    tokens = cut.bundle.parent / "tokens"
    known = "--role" in ground.checkout.run("token", "--help").printed
    token = make_token(ground.checkout, "eve", tokens, *(["--role", "train"] if known else []))
    told = []
    with (
        Server(ground.checkout, cut.server, ("--token-file", tokens)) as server,
        Line(server.url, cut.client, token) as eve,
        suppress(Gone),
    ):
        eve.hello()
        told.append(train(eve, 1))
        told.append(describe(eve.save(1)))
    published = (cut.server / "state.safetensors").exists()
    return Outcome(
        seen=f"answers: {', '.join(told)}; {'published' if published else 'not published'}"
        f"{'' if known else '; there are no roles'}",
        held=known and not published and told[:1] == ["Tensors"],
    )


ATTACKS = (
    Attack(
        fault="W", name="one token takes all connections and sessions", run=crowd,
        right="another's is welcome",
    ),
    Attack(
        fault="W", name="one token fills the disk", run=disk,
        right=f"Unsaved beyond its bound of {DISK_BYTES / 1e6:.0f} MB",
    ),
    Attack(
        fault="W", name="DNS rebinding", run=rebinding,
        right="refused, where no tokens are used",
    ),
    Attack(
        fault="W", name="a learning rate of 3e38", run=learning_rate,
        right="no outcome that is not finite",
    ),
    Attack(fault="W", name="a link among the pages", run=links, right="no file from elsewhere"),
    Attack(fault="W", name="HEAD", run=head, right="no body"),
    Attack(
        fault="W", name=f"{3 * FILES} connections to {FILES} open files", run=few_files,
        right="no traceback; the next one is welcome",
    ),
    Attack(
        fault="W", name="the served folder is deleted", run=deleted_folder,
        right="Unsaved; the folder is not made anew",
    ),
    Attack(
        fault="W", name="a token that may train publishes", run=role,
        right="Unsaved, or an error",
    ),
    Attack(
        fault="W", name="a redirect to another server", run=redirect,
        right="not followed",
    ),
)  # fmt: skip
