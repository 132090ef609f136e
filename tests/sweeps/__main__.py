"""Cut and train exported networks in full depth; print a table of what came out.

    python -m tests.sweeps FOLDER [NAME...]

FOLDER holds what make_keras.py and make_torch.py wrote; a result that stands there as
``NAME.json`` is not made again.  With ``SPLITONNX_PORTABLE_PYTHON`` every bundle of the target
``portable`` also trains under the stock ONNX Runtime of that environment.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from splitonnx.errors import SplitonnxError
from tests.support.trials import (
    TARGETS,
    Place,
    Subject,
    compare,
    find_unmoved,
    train,
    train_stock,
)

BATCH, STEPS = 2, 2
PIXELS = {"efficientnet-b0": 64}
"""Networks that scale pixels down themselves, and how far those vary."""
GAINS = {"inception-resnet-v2": 0.7, "resnet50": 0.7}
"""Networks whose sums grow block by block, and what their convolutions are scaled by for that."""
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


def try_network(path: Path) -> dict[str, Any]:
    """Cut at a first block, in the middle and U-shaped, on both targets."""
    start, model = time.monotonic(), onnx.load(path)
    enliven(model, GAINS.get(path.stem, 1.0))
    row: dict[str, Any] = {
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
        places = PLACES.get(path.stem) or subject.places
        row |= {"cuts": places, **try_targets(subject, places)}
    except (SplitonnxError, AssertionError) as error:
        row["error"] = f"{type(error).__name__}: {error}"
    return row | {"seconds": round(time.monotonic() - start)}


def enliven(model: onnx.ModelProto, gain: float = 1.0) -> None:
    """Bring convolutions to He's standard deviation: folded ones let signals fade to nothing."""
    kernels = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    for tensor in model.graph.initializer:
        if tensor.name in kernels:
            values = onnx.numpy_helper.to_array(tensor)
            wanted = gain * np.sqrt(2 / np.prod(values.shape[1:]))
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
        whole = train(bundle, subject)
        wholes.append(whole)
        count = len(whole.state)
        moved = count - len(find_unmoved(bundle, whole))
        assert moved > 0.9 * count, f"only {moved} of {count} weights moved"
        assert whole.losses.max() < 50, f"losses of {whole.losses}"
        found |= {"moved": [moved, count], "losses": whole.losses.tolist()}
        splits = []
        for place in places:
            bundle = subject.cut(*place, target)
            splits.append(compare(train(bundle, subject), whole))
            if target == "portable" and "SPLITONNX_PORTABLE_PYTHON" in os.environ:
                python = Path(os.environ["SPLITONNX_PORTABLE_PYTHON"])
                with tempfile.TemporaryDirectory() as folder:
                    (stock,) = train_stock(python, {Path(folder): (bundle, subject)}).values()
                found["stock"] = max(found.get("stock", 0.0), compare(stock, whole))
        found[target] = max(splits)
    return found | {"between": compare(wholes[1], wholes[0])}


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


def print_row(row: dict[str, Any]) -> None:
    """Print a network as a row of docs/networks.md."""
    moved, losses = row.get("moved", []), row.get("losses", [])
    shown = row | {
        "moved": "/".join(map(str, moved)),
        "losses": ", ".join(f"{loss:.4f}" for loss in losses),
        "parameters": f"{row['parameters']:,}",
        "cuts": len(row.get("cuts", [])),
    }
    fields = (
        *("name", "exporter", "opset", "nodes", "parameters", "moved", "losses", "training"),
        *("portable", "stock", "between", "cuts", "seconds"),
    )
    cells = [
        f"{shown[field]:.1e}" if isinstance(shown.get(field), float) else str(shown.get(field, "-"))
        for field in fields
    ]
    print("|", " | ".join(cells), "|", flush=True)
    if "error" in row:
        print("    ", row["error"], flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
