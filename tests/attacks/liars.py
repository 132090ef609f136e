"""Servers that keep a client busy for ever by saying what they said before."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from tests.attacks.files import shorten, write_digits
from tests.attacks.models import Cut
from tests.attacks.verdicts import Attack, Ground, Outcome
from tests.attacks.wires import decode, encode

GIVE_UP_SECONDS = 4
SECONDS = 40.0
"""Within which the client has to end with a sentence."""


class _Liar:
    """Welcomes everyone; ``repeats`` tells whether it then says its first answer again and again.

    Otherwise it hangs up at each task's first message.
    """

    def __init__(self, cut: Cut, *, repeats: bool) -> None:
        self.connections = self.answers = 0
        self._repeats = repeats
        self._manifest = cut.client / "manifest.json"

    def __call__(self, connection: ServerConnection) -> None:
        self.connections += 1
        with suppress(ConnectionClosed):
            hello, _ = self._read(connection)
            facts = {key: hello[key] for key in ("session", "digest", "step", "wires")}
            connection.send(encode({"type": "Welcome", **facts}))
            task, arrays = self._read(connection)
            while self._repeats:
                connection.send(encode(task, self._answer(hello, task, arrays)))
                self.answers += 1

    def _read(self, connection: ServerConnection) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        content = connection.recv()
        assert isinstance(content, bytes)
        return decode(content)

    def _answer(
        self, hello: Mapping[str, Any], task: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Make the server's activations of zeros, for as many rows as came."""
        rows = len(next(iter(arrays.values())))
        return {
            wire["tensor"]["name"]: np.zeros((rows, *wire["tensor"]["shape"][1:]), np.float32)
            for wire in hello["wires"][task["phase"]]
            if wire["sender"] == "server" and wire["kind"] == "activation"
        }


@contextmanager
def _serving(liar: _Liar) -> Iterator[str]:
    with serve(liar, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


def _train(ground: Ground, *, repeats: bool) -> Outcome:
    cut = ground.digits.copy(ground.room())
    data = write_digits(cut.bundle.parent)
    liar = _Liar(cut, repeats=repeats)
    with _serving(liar) as url:
        ended = ground.checkout.run(
            "train", cut.client, "--server", url, "--data", data, "--quiet",
            "--give-up-after", GIVE_UP_SECONDS, seconds=SECONDS,
        )  # fmt: skip
    told = shorten(ended.last_line) if ended.is_refusal else ended.how
    return Outcome(
        seen=f"{liar.connections} connections, {liar.answers:,} answers, {ended.seconds:.0f} s; "
        f"train: {told}",
        held=ended.is_refusal,
    )


def repeating(ground: Ground) -> Outcome:
    """Answer a client's first message, and say that answer again without end."""
    return _train(ground, repeats=True)


def welcoming(ground: Ground) -> Outcome:
    """Welcome a client, and hang up at its first message, again and again."""
    return _train(ground, repeats=False)


ATTACKS = (
    Attack(
        fault="W", name="a server that repeats itself without end", run=repeating,
        right=f"the client ends with a sentence within {SECONDS:.0f} s",
    ),
    Attack(
        fault="W", name="a server that only welcomes", run=welcoming,
        right=f"the client gives up after {GIVE_UP_SECONDS} s, as it was told",
    ),
)  # fmt: skip
