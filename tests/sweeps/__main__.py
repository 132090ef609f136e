"""Cut and train exported networks in full depth; print a table of what came out.

    python -m tests.sweeps FOLDER [NAME...]

FOLDER holds what make_keras.py and make_torch.py wrote; a result that stands there as
``NAME.json`` is not made again.  With ``SPLITONNX_PORTABLE_PYTHON`` every bundle of the target
``portable`` also trains under the stock ONNX Runtime of that environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from splitonnx.errors import SplitonnxError
from tests import portable_training
from tests.trials import TARGETS, Place, Subject, Trained, choose_places, compare, train

BATCH, STEPS = 2, 2
PIXELS = {"efficientnet-b0": 64}
"""Networks that scale pixels down themselves, and how far those vary."""
_GPT = "/network/transformer"
PLACES: dict[str, list[Place]] = {
    "gpt2": [
        (f"{_GPT}/drop/Dropout_output_0", f"{_GPT}/h.3/Add_1_output_0"),
        (f"{_GPT}/h.0/Add_1_output_0", f"{_GPT}/ln_f/LayerNormalization_output_0"),
    ]
}
"""Networks whose first and last matrix are one: only a U-shaped cut leaves it to one party."""


def main(folder: Path, names: list[str]) -> int:
    """Try each network; return 1 where one failed."""
    rows = []
    for path in sorted(folder.glob("*.onnx")):
        result = path.with_suffix(".json")
        if names and path.stem not in names:
            continue
        if not result.exists():
            result.write_text(json.dumps(try_network(path)))
        rows.append(json.loads(result.read_text()))
        print_row(rows[-1])
    return int(any("error" in row for row in rows))


def try_network(path: Path) -> dict[str, object]:
    """Cut at a first block, in the middle and U-shaped, on both targets."""
    start, model = time.monotonic(), onnx.load(path)
    enliven(model)
    row: dict[str, object] = {
        "name": path.stem,
        "exporter": f"{model.producer_name} {model.producer_version.split()[0]}",
        "opset": next(entry.version for entry in model.opset_import if not entry.domain),
        "nodes": len(model.graph.node),
        "parameters": sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer),
    }
    subject = Subject(
        model=model.SerializeToString(),
        data=draw_data(model, PIXELS.get(path.stem, 1)),
        batch=BATCH,
    )
    try:
        places = PLACES.get(path.stem) or choose_places(subject)
        row |= {"cuts": places, **try_targets(subject, places)}
    except (SplitonnxError, AssertionError) as error:
        row["error"] = f"{type(error).__name__}: {error}"
    return row | {"seconds": round(time.monotonic() - start)}


def enliven(model: onnx.ModelProto) -> None:
    """Bring convolutions to He's standard deviation: folded ones let signals fade to nothing."""
    kernels = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    for tensor in model.graph.initializer:
        if tensor.name in kernels:
            values = onnx.numpy_helper.to_array(tensor)
            wanted = np.sqrt(2 / np.prod(values.shape[1:]))
            scaled = (values * (wanted / max(float(values.std()), 1e-12))).astype(values.dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(scaled, tensor.name))


def try_targets(subject: Subject, places: list[Place]) -> dict[str, Any]:
    """Give the largest difference from unsplit training a target, and under stock ONNX Runtime.

    ``between`` is what lies between unsplit training on the two targets: other kernels.
    """
    found: dict[str, Any] = {}
    wholes = []
    for target in TARGETS:
        bundle = subject.cut(None, None, target)
        whole, first = train(bundle, subject), bundle.client.weights
        wholes.append(whole)
        moved = [not np.array_equal(value, first[name]) for name, value in whole.state.items()]
        assert sum(moved) > 0.9 * len(moved), f"only {sum(moved)} of {len(moved)} weights moved"
        found |= {"moved": [sum(moved), len(moved)], "losses": whole.losses.tolist()}
        splits = []
        for place in places:
            bundle = subject.cut(*place, target)
            splits.append(compare(train(bundle, subject), whole))
            if target == "portable" and "SPLITONNX_PORTABLE_PYTHON" in os.environ:
                with tempfile.TemporaryDirectory() as folder:
                    bundle.save(Path(folder) / "bundle")
                    stock = train_stock(Path(folder), subject, whole.state)
                found["stock"] = max(found.get("stock", 0.0), compare(stock, whole))
        found[target] = max(splits)
    return found | {"between": compare(wholes[1], wholes[0])}


def train_stock(folder: Path, subject: Subject, kept: Collection[str]) -> Trained:
    """Train a saved bundle with the stock ONNX Runtime of another environment."""
    arrays: dict[str, Any] = dict(subject.data)
    np.savez(folder / "data.npz", **arrays)
    script = Path(portable_training.__file__)
    python = os.environ["SPLITONNX_PORTABLE_PYTHON"]
    command = [python, str(script), f"--batch={BATCH}", str(folder)]
    subprocess.run(command, cwd=script.parent, check=True)
    with np.load(folder / "trained.npz") as trained:
        state = {name: trained[name] for name in trained.files if name in kept}
        losses = trained["#losses"]
    return Trained(losses=losses, state=state)


def draw_data(model: onnx.ModelProto, size: float = 1.0) -> dict[str, np.ndarray]:
    """Draw images or tokens, and labels that fit the scores."""
    random, samples = np.random.default_rng(3), BATCH * STEPS
    data = {}
    tokens = False
    for value in model.graph.input:
        dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
        tokens = value.type.tensor_type.elem_type == onnx.TensorProto.INT64
        data[value.name] = (
            random.integers(0, 2000, (samples, *dims))
            if tokens
            else size * random.standard_normal((samples, *dims), np.float32)
        )
    dims = [dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim]
    length = next(iter(data.values())).shape[1]  # of a text, which its scores do not declare
    shape = (samples, *(dim or length for dim in dims[2:]))
    return data | {"labels": random.integers(0, dims[1] or 10, shape)}


def print_row(row: dict[str, object]) -> None:
    """Print a network as a row of docs/networks.md."""
    fields = ("name", "exporter", "opset", "nodes", "parameters", "training", "portable", "stock")
    cells = [
        f"{row[field]:.1e}" if isinstance(row.get(field), float) else str(row.get(field, "-"))
        for field in fields
    ]
    cuts = row.get("cuts", [])
    count = len(cuts) if isinstance(cuts, list) else 0
    print("|", " | ".join([*cells, str(count), str(row["seconds"])]), "|", flush=True)
    if "error" in row:
        print("    ", row["error"], flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
