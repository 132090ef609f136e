"""Python clients that train one model with others; the JavaScript tests run them as a process.

    python -m tests.support.joint_clients

Each line on the standard input is a JSON object with the ``url`` of a server, the client's folder
as ``bundle``, the files of ``data``, and the ``seed``, ``epochs`` and ``batch_size``.  One client
trains for each file, all at the same time; the first has shared before the others begin.  Its state
is written beside its data, with ``.state`` at the end of the name.  Then a line of JSON says how
many steps each of them has made.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from splitonnx.bundles import PartyBundle
from splitonnx.codecs import decode_tensors, encode_tensors
from splitonnx.runtime.channels.channels import Channel
from splitonnx.runtime.client.clients import Client

WAIT = 60.0
"""Seconds within which the first client should have sent its share."""


@contextmanager
def noticing_a_share() -> Iterator[threading.Event]:
    """Yield an event that is set when a client has sent its first share, and waits."""
    sent = threading.Event()
    receive = Channel.receive_wires

    def notice(channel: Channel) -> Any:
        sent.set()
        return receive(channel)

    with patch.object(Channel, "receive_wires", notice):
        yield sent


def train(order: dict[str, Any], file: str) -> int:
    """Train one client, write its state, and return its steps."""
    data, _ = decode_tensors(Path(file).read_bytes(), max_header=1 << 20)
    bundle = PartyBundle.load(Path(order["bundle"]))
    with Client(bundle, order["url"], threads=1, seed=order["seed"], share=True) as client:
        history = client.fit(data, epochs=order["epochs"], batch_size=order["batch_size"])
        Path(f"{file}.state").write_bytes(b"".join(encode_tensors(client.state())))
    return len(history.steps)


if __name__ == "__main__":
    for line in sys.stdin:
        order = json.loads(line)
        with ThreadPoolExecutor(len(order["data"])) as pool, noticing_a_share() as sent:
            trained = []
            for data in order["data"]:
                trained.append(pool.submit(train, order, data))
                assert sent.wait(WAIT)
            steps = [one.result() for one in trained]
        print(json.dumps(steps), flush=True)
