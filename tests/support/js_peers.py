"""Run by the JavaScript tests: the zoo's bundles, what training them gives, and their servers.

    python -m tests.support.js_peers FOLDER

cuts every model of the zoo into portable parts, wherever it can be cut and U-shaped, and each small
model that once went wrong at one place.  For each it writes ``FOLDER/NAME/bundle``,
``data.safetensors`` and ``trained.safetensors``: the losses, and the state of the unsplit model,
trained by the training wheel.  Then it prints a line of JSON with all names, and serves: for each
line with a name on its standard input it prints the address of that bundle's server, untrained, and
ends the one before.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np

from splitonnx.bundles import Bundle
from splitonnx.codecs import encode_tensors
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut_prepared
from splitonnx.partitioner.reports.inspections import list_cuts
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.server.servers import Server
from splitonnx.states import STATE
from tests.support.small_models import load_data, load_model
from tests.support.zoo import ZOO, Arrays

BATCH = 8
EPOCHS = 2
SAMPLES = 24
SEED = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small model under ``tests/cases/models``: where it is cut, and what is said of it."""

    at: str
    loss: str = "cross-entropy"
    class_axis: int | None = None
    stop_gradients: tuple[str, ...] = ()


CASES = {
    "06_last_axis_classes": Case(at="a", class_axis=-1),
    "07_softmax_clip": Case(at="b"),
    "07_softmax_identity": Case(at="b"),
    "09_identity_transpose": Case(at="b"),
    "13_instancenorm_as_bn": Case(at="rl"),
    "32_stdconv": Case(at="c"),
    "41_lost_detach": Case(at="s", stop_gradients=("e",)),
}


def write_model(folder: Path, name: str) -> list[str]:
    """Cut one model of the zoo in several places, and train it whole; return the bundles' names."""
    entry = ZOO[name]
    prepared = prepare(open_model(entry.build()))
    data = entry.data(SAMPLES)
    trained = train_whole(cut_prepared(prepared, at=None, loss=entry.loss), data)
    cuts = [found.tensor for found in list_cuts(prepared, None)]
    written: list[str] = []
    for at, tail in [*((tensor, ()) for tensor in cuts), (cuts[0], cuts[-1])]:
        bundle = cut_prepared(
            prepared,
            at=at,
            tail_at=tail,
            loss=entry.loss,
            client_target="portable",
            server_target="portable",
        )
        written.append(f"{name}-{len(written)}")
        write(folder / written[-1], bundle, data, trained)
    return written


def write_case(folder: Path, name: str) -> str:
    """Cut one small model at its place, train it whole, and return its name."""
    case, data = CASES[name], load_data(name, rows=SAMPLES)
    prepared = prepare(open_model(load_model(name)), stop_gradients=case.stop_gradients)
    whole = cut_prepared(prepared, at=None, loss=case.loss, class_axis=case.class_axis)
    bundle = cut_prepared(
        prepared,
        at=case.at,
        loss=case.loss,
        class_axis=case.class_axis,
        client_target="portable",
        server_target="portable",
    )
    write(folder / name, bundle, data, train_whole(whole, data))
    return name


def train_whole(bundle: Bundle, data: Arrays) -> Arrays:
    """Train an uncut bundle, and return the losses and the state after it."""
    with Client(bundle.client, threads=1, seed=SEED) as client:
        history = client.fit(data, epochs=EPOCHS, batch_size=BATCH)
        losses = np.array([record.loss for record in history.steps])
        return {**client.state(), "#losses": losses}


def write(place: Path, bundle: Bundle, data: Arrays, trained: Arrays) -> None:
    """Write a bundle with its data and what training the unsplit model gave."""
    bundle.save(place / "bundle")
    for file, arrays in (("data", data), ("trained", trained)):
        (place / f"{file}.safetensors").write_bytes(b"".join(encode_tensors(arrays)))


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
        names += [write_case(root, name) for name in CASES]
        print(json.dumps(names), flush=True)
        serve(root)
