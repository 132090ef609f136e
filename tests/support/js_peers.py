"""Run by the JavaScript tests: the zoo's bundles, what training them gives, and their servers.

    python -m tests.support.js_peers FOLDER

cuts every model of the zoo into portable parts, wherever it can be cut and U-shaped, and each small
model that once went wrong at one place, and one model with each codec.  One cut of some models is
written a second time with ``-recomputed`` added to its name: its parties compute their forward
stages again.  For each bundle it writes
``FOLDER/NAME/bundle``,
``data.safetensors``, or ``data-0.safetensors`` and so on with a batch each, and
``trained.safetensors``: the losses, the state and the evaluation of the unsplit model, trained by
the training wheel; with a codec those of the split model.  Then it prints a line of JSON with all
names, and serves: for each line with a name on its standard input it prints the address of that
bundle's server, untrained, and ends the one before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx

from splitonnx.bundles import Bundle
from splitonnx.codecs import encode_tensors
from splitonnx.losses import Loss, LossSource
from splitonnx.names import PORTABLE, TRAINING, Target
from splitonnx.optimizers import Adam
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.cutting.transforms.crossings import encode_crossings
from splitonnx.partitioner.cutting.transforms.recomputations import recompute_stages
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut, cut_prepared
from splitonnx.partitioner.reports.inspections import list_cuts
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.runtime.server.servers import Server
from splitonnx.states import STATE
from splitonnx.wire_codecs import read_wire
from tests.support.carried import (
    AVERAGES,
    RECURRENT,
    build_averages,
    build_recurrent,
    draw_data,
)
from tests.support.small_models import load_data, load_model
from tests.support.zoo import ZOO, Arrays

BATCH = 8
EPOCHS = 2
SAMPLES = 24
MICRO_BATCHES = 3
"""Of a step of the bundles whose names say that they accumulate."""
SEED = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A small model under ``tests/cases/models``: where it is cut, and what is said of it.

    ``build`` makes a model that has no file, for the data of :func:`draw_data`.  ``batches`` cuts
    its data into batches of their own sizes, where they are not rows, or where a batch is fixed.
    """

    at: str | tuple[str, ...]
    tail_at: str | tuple[str, ...] = ()
    loss: LossSource = "cross-entropy"
    freeze: tuple[str, ...] = ()
    dims: Mapping[str, int | str] = field(default_factory=dict)
    ties: tuple[tuple[str, str], ...] = ()
    class_axis: int | None = None
    stop_gradients: tuple[str, ...] = ()
    states: Mapping[str, str] = field(default_factory=dict)
    build: Callable[[], onnx.ModelProto] | None = None
    batches: Callable[[Arrays], list[Arrays]] | None = None

    def cut(self, name: str, *, whole: bool = False) -> Bundle:
        """Cut the model into portable parts, or leave it whole for the training wheel."""
        target: Target = TRAINING if whole else PORTABLE
        return cut(
            self.build() if self.build else load_model(name),
            at=None if whole else self.at,
            tail_at=() if whole else self.tail_at,
            loss=self.loss,
            freeze=self.freeze,
            dims=self.dims,
            ties=self.ties,
            class_axis=self.class_axis,
            stop_gradients=self.stop_gradients,
            states=self.states,
            client_target=target,
            server_target=target,
        )


def take_rows(data: Arrays) -> list[Arrays]:
    """Cut data into full batches."""
    starts = range(0, SAMPLES, BATCH)
    return [{name: array[i : i + BATCH] for name, array in data.items()} for i in starts]


def take_columns(data: Arrays) -> list[Arrays]:
    """Cut data whose batch is on axis 1."""
    bounds = ((0, 8), (8, 11), (11, 24))
    return [{name: array[:, i:j] for name, array in data.items()} for i, j in bounds]


def take_lengths(data: Arrays) -> list[Arrays]:
    """Cut sequences to other lengths for each batch: all of theirs, one step, and three."""
    bounds = ((0, 8, 7), (8, 11, 1), (11, 24, 3))
    return [{"x": data["x"][i:j, :k], "labels": data["labels"][i:j]} for i, j, k in bounds]


def draw_graphs(data: Arrays) -> list[Arrays]:
    """Draw graphs of other sizes beside the one given."""
    random = np.random.default_rng(0)
    drawn: list[Arrays] = [
        {
            "x": random.standard_normal((nodes, 4), np.float32),
            "edges": random.integers(0, nodes, (2, edges)),
            "labels": random.integers(0, 3, nodes),
        }
        for nodes, edges in ((5, 1), (31, 80))
    ]
    return [data, *drawn]


CASES = {
    "04_aux_head": Case(at=("r", "t")),
    "05_siamese_bn": Case(at="p"),
    "06_last_axis_classes": Case(at="a", class_axis=-1),
    "07_softmax_clip": Case(at="b"),
    "07_softmax_identity": Case(at="b"),
    "08_buffers": Case(at="c", freeze=("^(pe|dft)$",)),
    "09_identity_transpose": Case(at="b"),
    "11_lstm_dynamic_time": Case(at="h", batches=take_lengths),
    "12_batch_baked": Case(at="a"),
    "13_instancenorm_as_bn": Case(at="rl"),
    "16_scalar_axes": Case(at="a"),
    "17_gathernd_batch": Case(at=("a", "idx")),
    "20_gnn": Case(at="r", batches=draw_graphs),
    "22_if_batch_one": Case(at="a"),
    "23_ignore": Case(at="a", tail_at="b", loss=Loss(ignore_index=-100, label_smoothing=0.1)),
    "24_bn_small_batch": Case(at="r", freeze=("^b1$",)),  # its gradient is nothing but rounding
    "29_batch_axis_1": Case(at="Y", loss="mse", batches=take_columns),
    "30_lost_tie": Case(at="e", tail_at="m", ties=(("shared.weight", "onnx::MatMul_1430"),)),
    "32_stdconv": Case(at="c"),
    "33_simplified_layernorm": Case(at="n"),
    "34_passed_through": Case(at=("b", "x")),
    "36_bn_untracked": Case(at="r"),
    "39_lstm_layout1": Case(at="f"),
    "41_lost_detach": Case(at="s", stop_gradients=("e",)),
    "42_fixed_batch": Case(at="b", dims={"x:0": "N"}),
    "43_loop_if_scan": Case(at="h", batches=take_lengths),
    "state-client": Case(
        at="h",
        tail_at="p",
        loss="mse",
        dims={"N": BATCH},
        states=RECURRENT,
        build=build_recurrent,
        batches=take_rows,
    ),
    "state-server": Case(
        at="a",
        loss="mse",
        dims={"N": BATCH},
        states=RECURRENT,
        build=build_recurrent,
        batches=take_rows,
    ),
    "state-both": Case(at="z", loss="mse", states=AVERAGES, build=build_averages),
}


RECOMPUTED = ("attention", "batchnorm_trained", "dropout")
"""Models of the zoo of which one cut is also written so that forward stages are computed again."""


def write_model(folder: Path, name: str) -> list[str]:
    """Cut one model of the zoo in several places, and train it whole; return the bundles' names."""
    entry = ZOO[name]
    prepared = prepare(open_model(entry.build()))
    data = entry.data(SAMPLES)
    trained = train_whole(cut_prepared(prepared, at=None, loss=entry.loss), data)
    cuts = [found.tensor for found in list_cuts(prepared, None)]
    written: list[str] = []
    repeated: list[str] = []
    whole = cut_prepared(prepared, at=None, loss=entry.loss)
    accumulated = train_whole(whole, data, accumulate=MICRO_BATCHES)
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
        if at == cuts[len(cuts) // 2] and name in RECOMPUTED:
            write(
                folder / f"{written[-1]}-recomputed", recompute_stages(bundle, True), data, trained
            )
            repeated.append(f"{written[-1]}-recomputed")
    written.append(f"{name}-accumulated")
    write(folder / written[-1], bundle, data, accumulated)  # the U-shaped one
    written += repeated
    return written


def write_clipped(folder: Path) -> str:
    """Cut one model U-shaped with gradient clipping, train it whole in steps of micro-batches."""
    entry, name = ZOO["convolutions"], "clipped-accumulated"
    prepared = prepare(open_model(entry.build()))
    bundle = cut_prepared(
        prepared,
        at="r1",
        tail_at="flat",
        loss=entry.loss,
        optimizer=Adam(clip_norm=0.1),
        client_target="portable",
        server_target="portable",
    )
    whole = cut_prepared(prepared, at=None, loss=entry.loss, optimizer=Adam(clip_norm=0.1))
    data = entry.data(SAMPLES)
    write(folder / name, bundle, data, train_whole(whole, data, accumulate=MICRO_BATCHES))
    return name


def write_case(folder: Path, name: str) -> str:
    """Cut one small model at its place, train it whole, and return its name."""
    case = CASES[name]
    rows = None if case.batches else SAMPLES
    data = draw_data(SAMPLES) if case.build else load_data(name, rows)
    given = case.batches(data) if case.batches else data
    write(folder / name, case.cut(name), given, train_whole(case.cut(name, whole=True), given))
    return name


CODECS = (
    "fp16",
    "fwd=int8,bwd=bf16",
    "int8",
    "int4",
    "topk=0.25",
    "randtopk=0.25",
    "fwd=bf16,bwd=topk=0.25+ef",
)
"""What crosses the cut of one model is encoded by each of these."""


def write_coded(folder: Path, wire: str) -> str:
    """Cut one model U-shaped with a codec, train its parts, and return the bundle's name."""
    entry, name = ZOO["convolutions"], f"wire-{wire.replace('=', '-').replace(',', '-')}"
    plain = cut(
        entry.build(),
        at="r1",
        tail_at="flat",
        loss=entry.loss,
        dims={"N": BATCH} if wire.endswith("+ef") else {},
        client_target="portable",
        server_target="portable",
    )
    bundle, data = encode_crossings(plain, read_wire(wire)), entry.data(SAMPLES)
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, link, threads=1, seed=SEED) as client:
        history = client.fit(data, epochs=EPOCHS, batch_size=BATCH)
        link.drain()
        trained = {**client.state(), **link.executor.state()}
    trained["#losses"] = np.array([record.loss for record in history.steps])
    write(folder / name, bundle, data, trained)
    return name


def train_whole(bundle: Bundle, data: Arrays | list[Arrays], accumulate: int = 1) -> Arrays:
    """Train an uncut bundle, and return the losses, and the state and the evaluation after it."""
    with Client(bundle.client, threads=1, seed=SEED) as client:
        history = client.fit(data, epochs=EPOCHS, batch_size=BATCH, accumulate=accumulate)
        losses = np.array([record.loss for record in history.steps])
        evaluated = np.array(client.evaluate(data, batch_size=BATCH)["loss"])
        return {**client.state(), "#losses": losses, "#evaluated": evaluated}


def write(place: Path, bundle: Bundle, data: Arrays | list[Arrays], trained: Arrays) -> None:
    """Write a bundle with its data and what training the unsplit model gave.

    Data are one file, or one for each batch.
    """
    bundle.save(place / "bundle")
    files = (
        {f"data-{number}": batch for number, batch in enumerate(data)}
        if isinstance(data, list)
        else {"data": data}
    )
    for file, arrays in {**files, "trained": trained}.items():
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
        names += [write_coded(root, wire) for wire in CODECS]
        names.append(write_clipped(root))
        print(json.dumps(names), flush=True)
        serve(root)
