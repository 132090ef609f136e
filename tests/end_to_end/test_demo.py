"""The example's model and what the demo reads; the demo itself runs in test_packaging."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest

from splitonnx import Client, cut, merge
from tests.conftest import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def _import_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


def test_the_script_writes_the_committed_model(tmp_path: Path) -> None:
    again = tmp_path / "again.onnx"
    subprocess.run([sys.executable, EXAMPLES / "make_digits_model.py", again], check=True)
    assert again.read_bytes() == (EXAMPLES / "digits.onnx").read_bytes()


def test_the_model_has_what_a_real_one_has() -> None:
    model = onnx.load(EXAMPLES / "digits.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert {"Conv", "BatchNormalization", "Add", "MaxPool", "Dropout", "Gemm"} <= set(kinds)
    assert (model.opset_import[0].version, model.ir_version) == (18, 10)


def test_the_demo_reads_a_training_s_lines() -> None:
    demo = import_module("demo")
    size = demo.BATCH

    def step(samples: int, seconds: float) -> dict[str, float]:
        return {"samples": samples, "seconds": seconds, "bytes_up": samples, "bytes_down": 2}

    def evaluation(accuracy: float) -> dict[str, dict[str, float]]:
        return {"metrics": {"accuracy": accuracy}}

    records = [step(size, 1), step(size, 3), step(5, 100), evaluation(0.2), step(size, 2)]
    lines = "\n".join(json.dumps(record) for record in [*records, evaluation(0.9)])
    assert demo.Run.read(lines) == demo.Run(accuracy=0.9, seconds=2, bytes_up=size, bytes_down=2)


def test_the_demo_notices_a_model_that_disagrees(tmp_path: Path) -> None:
    demo = import_module("demo")
    bundle = cut(EXAMPLES / "digits.onnx", at=None)
    path = tmp_path / "merged.onnx"
    path.write_bytes(merge(bundle))
    image = np.random.default_rng(0).random((8, 1, 8, 8), np.float32)
    with Client(bundle.client) as client:
        logits = client.predict({"image": image})["logits"]
    assert demo.compare_outputs(path, image, logits) <= demo.AGREEMENT
    logits[3, 4] += 0.1
    assert demo.compare_outputs(path, image, logits) > demo.AGREEMENT
