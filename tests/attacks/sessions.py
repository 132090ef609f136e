"""F7: names of sessions that ended, or were not taken up again."""

from __future__ import annotations

from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numpy as np

from tests.attacks.models import Cut
from tests.attacks.processes import Server, make_token
from tests.attacks.verdicts import Attack, Ground, Outcome
from tests.attacks.wires import Gone, Line, describe


def train(line: Line, steps: int, *, value: float = 1.0, begin: int = 0, rate: float = 1e-3) -> str:
    """Make steps of the quickstart's bundle by hand; give the last answer."""
    told = "nothing"
    for step in range(begin, begin + steps):
        for turn, kind in enumerate(("activation", "gradient")):
            (name,) = line.names("train", "client", kind)
            shape = (1, 24, 8, 8) if kind == "activation" else (1, 48, 2, 2)
            task = line.task(step=step, turn=turn, learning_rate=rate)
            told = describe(line.ask(task, {name: np.full(shape, value, np.float32)})[0])
            if told != "Tensors":
                return told
    return told


def _digest(folder: Path, session: str) -> dict[str, str]:
    """Digest the files that are a session's: outcomes and checkpoints."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        own = session in str(path) or path.name == "state.safetensors"
        if path.is_file() and own and not path.name.startswith("."):
            digests[str(path.relative_to(folder))] = sha256(path.read_bytes()).hexdigest()
    return digests


def _prepare(ground: Ground) -> tuple[Cut, Path, str, str]:
    cut = ground.digits.copy(ground.room())
    tokens = cut.bundle.parent / "tokens"
    ana, eve = (make_token(ground.checkout, name, tokens) for name in ("ana", "eve"))
    return cut, tokens, ana, eve


def finished_name(ground: Ground) -> Outcome:
    """Take the name of another's finished session, and publish in it."""
    cut, tokens, ana, eve = _prepare(ground)
    with Server(ground.checkout, cut.server, ("--token-file", tokens)) as server:
        with Line(server.url, cut.client, ana) as owner:
            owner.hello()
            train(owner, 2)
            owner.save(2)
            owner.leave()
        before = _digest(cut.server, owner.session)
        told = []
        with Line(server.url, cut.client, eve) as thief:
            thief.session = owner.session
            with suppress(Gone):
                told.append(describe(thief.hello()))
                told.append(train(thief, 1, value=3.0))
                told.append(describe(thief.save(1)))
        after = _digest(cut.server, owner.session)
    harmed = before != after
    return Outcome(
        seen=f"answers: {', '.join(told)}; the outcome is {'overwritten' if harmed else 'whole'}",
        held=not harmed and told[:1] == ["ForeignSession"],
    )


def foreign_origin(ground: Ground) -> Outcome:
    """Name another's finished session as the origin of one's own."""
    cut, tokens, ana, eve = _prepare(ground)
    with Server(ground.checkout, cut.server, ("--token-file", tokens)) as server:
        with Line(server.url, cut.client, ana) as owner:
            owner.hello()
            train(owner, 2)
            owner.save(2)
            owner.leave()
        with Line(server.url, cut.client, ana) as again:
            mine = describe(again.hello(origin=owner.session, start=2, step=2))
        with Line(server.url, cut.client, eve) as thief:
            told = describe(thief.hello(origin=owner.session, start=2, step=2))
    return Outcome(
        seen=f"the thief: {told}; the owner: {mine}", held=told != "Welcome" and mine == "Welcome"
    )


def unloaded_name(ground: Ground) -> Outcome:
    """Take the name of a session that a server started again has not taken up."""
    cut, tokens, ana, eve = _prepare(ground)
    options = ("--token-file", tokens)
    with Server(ground.checkout, cut.server, options) as server:
        with Line(server.url, cut.client, ana) as owner:
            owner.hello()
            train(owner, 2)
            owner.save(2, publish=False)
        server.stop()
    before = _digest(cut.server, owner.session)
    told = []
    with (
        Server(ground.checkout, cut.server, options) as server,
        Line(server.url, cut.client, eve) as thief,
        suppress(Gone),
    ):
        thief.session = owner.session
        told.append(describe(thief.hello()))
        told.append(train(thief, 3, value=3.0))
        told.append(describe(thief.save(3)))
        thief.leave()
    after = _digest(cut.server, owner.session)
    lost = sum(after.get(name) != digest for name, digest in before.items())
    return Outcome(
        seen=f"answers: {', '.join(told)}; {lost} of {len(before)} files lost",
        held=before == after and bool(before) and told[:1] == ["ForeignSession"],
    )


ATTACKS = (
    Attack(
        fault="F7", name="the name of a finished session", run=finished_name,
        right="ForeignSession; the outcome stays",
    ),
    Attack(
        fault="F7", name="another's session as origin", run=foreign_origin,
        right="refused; its owner may",
    ),
    Attack(
        fault="F7", name="the name of a session that was not taken up", run=unloaded_name,
        right="ForeignSession; the checkpoints stay",
    ),
)  # fmt: skip
