"""Run by the JavaScript tests: Python clients that train one model with others.

    python -m tests.support.joint_clients

Each line on the standard input is a JSON object with the ``url`` of a server, the client's folder
as ``bundle``, the files of ``data``, and the ``seed``, ``epochs`` and ``batch_size``.  One client
trains for each file, all at the same time; its state is written beside its data, with ``.state`` at
the end of the name.  Then a line of JSON says how many steps each of them has made.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from splitonnx.bundles import PartyBundle
from splitonnx.codecs import decode_tensors, encode_tensors
from splitonnx.runtime.client.clients import Client


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
        with ThreadPoolExecutor(len(order["data"])) as pool:
            steps = pool.map(lambda file, order=order: train(order, file), order["data"])
        print(json.dumps(list(steps)), flush=True)
