"""The locks of the command line: making tokens and certificates, and training with them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
import trustme

from splitonnx.bundles import Bundle
from tests.support.commands import MODEL, Command, start


@pytest.fixture
def token(command: Command, tmp_path: Path) -> Path:
    """A client's file, whose token the file ``tokens`` beside it knows as ana's."""
    out = command.succeed("token", "ana", "--token-file", tmp_path / "tokens")
    (tmp_path / "mine").write_text(out)
    (tmp_path / "mine").chmod(0o600)
    return tmp_path / "mine"


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run a server, and give its address and its process."""
    process = start("serve", *arguments, "--port", 0)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"wss?://[^\s\"]+", line)
        assert found, line
        yield found[0], process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_a_token_is_shown_once_and_kept_as_a_hash(command: Command, tmp_path: Path) -> None:
    code, out, err = command("token", "ana", "--token-file", tmp_path / "tokens")
    assert code == 0
    assert re.fullmatch(r"[\w-]{43}\n", out)
    assert "added ana" in err
    assert re.fullmatch(r"ana sha256:[0-9a-f]{64}\n", (tmp_path / "tokens").read_text())
    assert "not a name" in command.fail("token", "a b", "--token-file", tmp_path / "tokens")


def test_with_the_token_one_trains_and_predicts_and_without_one_does_not(
    command: Command, bundle: Path, data: Path, token: Path, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    with serving(bundle / "server", "--token-file", tokens, "--log-format", "json") as (
        url,
        process,
    ):
        arguments = ("train", bundle / "client", "--server", url, "--data", data, "--quiet")
        assert "Unauthorized: no token that is known here" in command.fail(*arguments)
        (tmp_path / "other").write_text("x" * 43)
        (tmp_path / "other").chmod(0o600)
        line = command.fail(*arguments, "--token-file", tmp_path / "other")
        assert "refused to let this side in (401)" in line
        assert command(*arguments, "--token-file", token) == (0, "", "")
        predicted = tmp_path / "predicted.npz"
        command.succeed(
            "predict", bundle / "client", "--server", url, "--data", data, "-o", predicted,
            "--token-file", token,
        )  # fmt: skip
        health = json.load(urlopen(f"{url.replace('ws', 'http', 1)}/health"))
        assert health["status"] == "ok"
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert Bundle.load(bundle).client.step > 0
    events = [json.loads(line) for line in err.splitlines()]
    assert {"WrongToken"} <= {event.get("reason") for event in events}
    assert {"ana"} <= {event.get("owner") for event in events}
    assert token.read_text().strip() not in err


def test_with_tls_both_sides_know_each_other(
    command: Command, bundle: Path, data: Path, tmp_path: Path
) -> None:
    authority = trustme.CA()
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "cert", "key", "own", "own-key")}
    authority.cert_pem.write_to_path(str(files["ca"]))
    server, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("ana@x.example")
    server.cert_chain_pems[0].write_to_path(str(files["cert"]))
    server.private_key_pem.write_to_path(str(files["key"]))
    client.cert_chain_pems[0].write_to_path(str(files["own"]))
    client.private_key_pem.write_to_path(str(files["own-key"]))
    with serving(
        bundle / "server", "--tls-cert", files["cert"], "--tls-key", files["key"],
        "--client-ca", files["ca"],
    ) as (url, _):  # fmt: skip
        arguments = ("train", bundle / "client", "--server", url, "--data", data, "--quiet")
        assert url.startswith("wss://")
        assert "cannot be trusted" in command.fail(*arguments)
        own = ("--cert", files["own"], "--key", files["own-key"])
        assert command(*arguments, "--ca", files["ca"], *own) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--host", "0.0.0.0"], "--token-file"),
        (["--host", "::"], "--insecure"),
        (["--tls-cert", "x.pem"], "--tls-key"),
        (["--client-ca", "x.pem"], "needs TLS"),
        (["--tls-cert", "missing.pem", "--tls-key", "missing.pem"], "missing.pem"),
        (["--token-file", "missing"], "missing"),
        (["--origin", "lab.example"], "not an origin"),
        (["--max-clients", "0"], "--max-clients must be positive"),
        (["--max-idle-seconds", "1"], "--max-message-seconds"),
        (["--quiet", "--log-level", "debug"], "exclude each other"),
    ],
)
def test_locks_that_do_not_lock_are_refused(
    command: Command, bundle: Path, arguments: list[str], reason: str
) -> None:
    assert reason in command.fail("serve", bundle / "server", "--port", 0, *arguments)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--local", "--token-file", "x"], "--token-file: for a server"),
        (["--server", "ws://127.0.0.1:1", "--ca", "missing.pem"], "missing.pem"),
        (["--server", "ws://127.0.0.1:1", "--cert", "x.pem"], "--key"),
        (["--server", "ws://127.0.0.1:1", "--token-file", "missing"], "missing"),
        (["--server", "ws://ana:secret@127.0.0.1:1"], "use a token"),
    ],
)
def test_keys_that_fit_no_lock_are_refused(
    command: Command, bundle: Path, data: Path, arguments: list[str], reason: str
) -> None:
    source = bundle / "client"
    if "--local" in arguments:
        source = MODEL
    assert reason in command.fail("train", source, "--data", data, *arguments)
