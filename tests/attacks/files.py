"""F5, F6 and F9: what lies in a party's folder, and who else is there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np

from tests.attacks.models import make_endless
from tests.attacks.processes import Ended, NotServed, Server
from tests.attacks.verdicts import Attack, Ground, Outcome
from tests.attacks.wires import Gone, Line

SECONDS = 20.0
"""Within which a command that is refused has to end."""


def write_digits(folder: Path, rows: int = 64) -> Path:
    """Write data for the quickstart's model."""
    random = np.random.default_rng(0)
    path = folder / "data.npz"
    image = random.random((rows, 1, 8, 8), np.float32)
    np.savez(path, image=image, labels=random.integers(0, 10, rows))
    return path


def flip(path: Path, bit: int = 3) -> None:
    """Flip one bit of the last number but two."""
    content = bytearray(path.read_bytes())
    content[-10] ^= 1 << bit
    path.write_bytes(content)


def flipped_weights(ground: Ground) -> Outcome:
    """Flip a bit of a server's weights; verify, serve and train."""
    folder = ground.room()
    cut = ground.digits.copy(folder)
    data = write_digits(folder)
    flip(cut.server / "weights.safetensors")
    verified = ground.checkout.run("verify", cut.bundle, "--data", data, "--steps", 2)
    try:
        with Server(ground.checkout, cut.server):
            served = "serves them"
    except NotServed as error:
        served = f"{error}"
    seen = f"verify: {verified.how}; serve: {shorten(served)}"
    return Outcome(seen=seen, held=verified.is_refusal and served.startswith("splitonnx: "))


def flipped_manifest(ground: Ground) -> Outcome:
    """Flip a bit of the learning rate in a client's manifest, and train."""
    folder = ground.room()
    cut = ground.digits.copy(folder)
    data = write_digits(folder)
    path = cut.client / "manifest.json"
    content = bytearray(path.read_bytes())
    content[content.index(b'"learning_rate": 0.00') + len('"learning_rate": 0.0')] ^= 1
    path.write_bytes(content)
    with Server(ground.checkout, cut.server) as server:
        ended = ground.checkout.run("train", cut.client, "--server", server.url, "--data", data)
    return Outcome(seen=f"train: {_tell(ended)}", held=ended.is_refusal)


def flipped_state(ground: Ground) -> Outcome:
    """Train, flip a bit of what the client came to, and merge."""
    folder = ground.room()
    cut = ground.digits.copy(folder)
    data = write_digits(folder)
    with Server(ground.checkout, cut.server) as server:
        ground.checkout.must("train", cut.client, "--server", server.url, "--data", data)
        server.stop()
    merge, merged = ("merge", cut.bundle, "-o", folder / "merged.onnx", "--force"), []
    for party in (cut.client, cut.server):
        state = party / "state.safetensors"
        whole = state.read_bytes()
        flip(state)
        merged.append(ground.checkout.run(*merge))
        state.write_bytes(whole)
    good = ground.checkout.run(*merge)
    seen = "merge: " + "; ".join(_tell(ended) for ended in merged) + f"; unharmed: {good.how}"
    return Outcome(seen=seen, held=all(ended.is_refusal for ended in merged) and good.code == 0)


def _tell(ended: Ended) -> str:
    return shorten(ended.last_line) if ended.is_refusal else ended.how


def shorten(line: str) -> str:
    """Leave a sentence's folders out, and cut it off."""
    return re.sub(r"/\S*/", "", line.removeprefix("splitonnx: "))[:80]


def two_servers(ground: Ground) -> Outcome:
    """Serve a folder twice at a time, and once more after the first was killed."""
    cut = ground.digits.copy(ground.room())
    try:
        with Server(ground.checkout, cut.server), Server(ground.checkout, cut.server):
            second = "serves too"
    except NotServed as error:
        second = str(error)
    try:
        with Server(ground.checkout, cut.server):
            third = "serves"
    except NotServed as error:
        third = str(error)
    return Outcome(
        seen=f"the second: {shorten(second)}; one after the first was killed: {shorten(third)}",
        held=second.startswith("splitonnx: ") and third == "serves",
    )


def two_trainings(ground: Ground) -> Outcome:
    """Train in one client's folder twice at a time."""
    folder = ground.room()
    cut = ground.digits.copy(folder)
    data = write_digits(folder, 512)
    with Server(ground.checkout, cut.server) as server:
        words = (cut.client, "--server", server.url, "--data", data, "--quiet")
        first = subprocess.Popen(
            ground.checkout.command("train", *words, "--epochs", 200, "--checkpoint-every", 1),
            env=ground.checkout.environment,
            cwd="/",  # where a checkout lies, its code would come first
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        sessions = cut.client / "sessions"
        while not (sessions.exists() and any(sessions.iterdir())) and first.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                first.wait(0.05)
        second = ground.checkout.run("train", *words, "--restart", seconds=60)
        alive = first.poll() is None
        first.kill()
        first.wait()
    return Outcome(
        seen=f"the second: {_tell(second)}; the first {'trains on' if alive else 'ended'}",
        held=second.is_refusal and alive,
    )


def endless_stage(ground: Ground) -> Outcome:
    """Let a stage run for ever, and send SIGTERM twice."""
    folder = ground.room()
    cut = ground.digits.copy(folder)
    manifest = json.loads((cut.server / "manifest.json").read_text())
    (train,) = (phase for phase in manifest["phases"] if phase["name"] == "train")
    file = train["stages"][0]["graph"]
    graph = make_endless((cut.server / file).read_bytes())
    (cut.server / file).write_bytes(graph)
    manifest["files"][file] = sha256(graph).hexdigest()
    manifest.pop("sha256", None)  # bundles of earlier versions have none
    (cut.server / "manifest.json").write_text(json.dumps(manifest))
    seen, held = [], True
    for number in (signal.SIGTERM, signal.SIGINT):
        with (
            Server(ground.checkout, cut.server) as server,
            Line(server.url, cut.client) as eve,
        ):
            eve.hello()
            (forward,) = eve.names("train", "client", "activation")
            eve.send(eve.task(), {forward: np.ones((1, 24, 8, 8), np.float32)})
            with suppress(TimeoutError, Gone):
                eve.receive(2.0)
            server.process.send_signal(number)
            server.death(2.0)
            if server.is_alive:
                server.process.send_signal(number)
            death = server.death(SECONDS / 2)
        seen.append(f"{number.name} twice: {death or 'nothing'}")
        held = held and death is not None
    return Outcome(seen="; ".join(seen), held=held)


def pipe_as_weights(ground: Ground) -> Outcome:
    """Serve a folder whose weights are a FIFO."""
    cut = ground.digits.copy(ground.room())
    weights = cut.server / "weights.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    return _expect_refusals(ground, cut.server)


def endless_manifest(ground: Ground) -> Outcome:
    """Serve a folder whose manifest is /dev/zero."""
    cut = ground.digits.copy(ground.room())
    manifest = cut.server / "manifest.json"
    manifest.unlink()
    manifest.symlink_to("/dev/zero")
    return _expect_refusals(ground, cut.server)


def _expect_refusals(ground: Ground, folder: Path) -> Outcome:
    bound = ["bash", "-c", 'ulimit -v 8000000; exec "$@"', "-"]  # the machine has others on it
    with subprocess.Popen(
        [*bound, *ground.checkout.command("serve", folder, "--port", 0)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ground.checkout.environment,
        cwd="/",
    ) as process:
        try:
            printed, _ = process.communicate(timeout=SECONDS)
            ended = Ended(code=process.returncode, seconds=0, printed=printed)
        except subprocess.TimeoutExpired:
            process.kill()
            ended = Ended(code=None, seconds=SECONDS, printed="")
    return Outcome(seen=f"serve: {_tell(ended)}", held=ended.is_refusal)


ATTACKS = (
    Attack(
        fault="F5", name="a flipped bit in weights", run=flipped_weights,
        right="refused by a checksum",
    ),
    Attack(
        fault="F5", name="a flipped bit in a manifest", run=flipped_manifest,
        right="refused by a checksum",
    ),
    Attack(
        fault="F5", name="a flipped bit in what training came to", run=flipped_state,
        right="refused by a checksum",
    ),
    Attack(
        fault="F6", name="two servers on one folder", run=two_servers,
        right="a sentence for the second; nothing is left locked",
    ),
    Attack(
        fault="F6", name="two trainings in one folder", run=two_trainings,
        right="a sentence for the second; the first trains on",
    ),
    Attack(
        fault="F9", name="a stage that runs for ever", run=endless_stage,
        right="a second signal ends the server",
    ),
    Attack(
        fault="F9", name="a FIFO as weights", run=pipe_as_weights,
        right="refused by a sentence",
    ),
    Attack(
        fault="F9", name="/dev/zero as manifest", run=endless_manifest,
        right="refused by a sentence",
    ),
)  # fmt: skip
