"""Run by the JavaScript tests: the zoo's bundles, what training them gives, and their servers.

    python -m tests.support.js_peers FOLDER

cuts every model of the zoo into portable parts, wherever it can be cut and U-shaped, and writes
for each ``FOLDER/NAME/bundle``, ``data.safetensors`` and ``trained.safetensors``: the losses, and
the state of the unsplit model, trained by the training wheel.  Then it prints a line of JSON with
all names, and serves: for each line with a name on its standard input it prints the address of that
bundle's server, untrained, and ends the one before.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np

from splitonnx.codecs import encode_tensors
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import inspect
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.server.servers import Server
from splitonnx.states import STATE
from tests.support.zoo import ZOO

BATCH = 8
EPOCHS = 2
SAMPLES = 24
SEED = 3


def write_model(folder: Path, name: str) -> list[str]:
    """Cut one model in several places, and train it whole; return the bundles' names."""
    entry = ZOO[name]
    model = entry.build()
    data = entry.data(SAMPLES)
    whole = cut(model, at=None, loss=entry.loss).client
    with Client(whole, threads=1, seed=SEED) as client:
        history = client.fit(data, epochs=EPOCHS, batch_size=BATCH)
        losses = np.array([record.loss for record in history.steps])
        trained = {**client.state(), "#losses": losses}
    cuts = [found.tensor for found in inspect(model)]
    written: list[str] = []
    for at, tail in [*((tensor, ()) for tensor in cuts), (cuts[0], cuts[-1])]:
        bundle = cut(
            model,
            at=at,
            tail_at=tail,
            loss=entry.loss,
            client_target="portable",
            server_target="portable",
        )
        written.append(f"{name}-{len(written)}")
        place = folder / written[-1]
        bundle.save(place / "bundle")
        for file, arrays in (("data", data), ("trained", trained)):
            (place / f"{file}.safetensors").write_bytes(b"".join(encode_tensors(arrays)))
    return written


def serve(folder: Path) -> None:
    """Serve whichever bundle is asked for."""
    with ExitStack() as serving:
        for line in sys.stdin:
            serving.close()
            part = folder / line.strip() / "bundle" / "server"
            (part / STATE).unlink(missing_ok=True)
            server = Server(part, port=0, threads=1)
            print(json.dumps(serving.enter_context(server).url), flush=True)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    with patch("os.fsync", lambda handle: None):  # none of it has to outlive a crash
        names = [name for model in ZOO for name in write_model(root, model)]
        print(json.dumps(names), flush=True)
        serve(root)
