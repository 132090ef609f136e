"""What people call first with PyTorch: the advice of `check` is read, followed, and works.

Needs PyTorch; `make test-torch` installs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import splitonnx.torch  # noqa: E402 - after the skip
from splitonnx.names import BatchNormMode  # noqa: E402
from splitonnx.partitioner.permissions import cut  # noqa: E402
from splitonnx.partitioner.reports.checks import Check, check  # noqa: E402
from splitonnx.partitioner.reports.remarks import Kind  # noqa: E402
from splitonnx.verifications import verify  # noqa: E402
from tests.support.torch_networks import Convolutional, Recurrent, Tied  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.long]
LACKING = {
    Kind.COMPUTED_WEIGHTS, Kind.FIXED_BATCH, Kind.FROZEN_BATCHNORM, Kind.JOINED_PARAMETERS,
    Kind.LOST_DROPOUT, Kind.NO_BATCHNORM,
}  # fmt: skip


def call_plainly(network: Any, example: Any) -> None:
    """Export as everybody does first, in eval mode and for one sample."""
    torch.onnx.export(network.eval(), (example[:1],), "plain.onnx")


def call_legacy(network: Any, example: Any) -> None:
    torch.onnx.export(network, (example[:1],), "plain.onnx", dynamo=False)


def call_dynamo(network: Any, example: Any) -> None:
    """Export as PyTorch's documentation and ours said, in training mode and without folding."""
    batch = torch.export.Dim("N", min=2, max=4096)
    program = torch.onnx.export(
        network.train(), (example,), dynamo=True, optimize=False, dynamic_shapes=({0: batch},)
    )
    program.save("plain.onnx")


IMAGES, TOKENS = torch.randn(4, 1, 6, 6), torch.randint(0, 12, (4, 5))
SERIES = torch.randn(4, 3, 3)
CASES: dict[str, tuple[Callable[[], Any], Any, Callable[..., None], set[Kind]]] = {
    "plain": (Convolutional, IMAGES, call_plainly, {Kind.FIXED_BATCH, Kind.NO_BATCHNORM}),
    "documented dynamo": (Convolutional, IMAGES, call_dynamo, {Kind.FROZEN_BATCHNORM}),
    "legacy": (
        Tied, TOKENS, call_legacy,
        {Kind.FIXED_BATCH, Kind.FROZEN_BATCHNORM, Kind.JOINED_PARAMETERS, Kind.COMPUTED_WEIGHTS},
    ),
    "recurrent dropout": (
        Recurrent, SERIES, call_legacy,
        {Kind.FIXED_BATCH, Kind.LOST_DROPOUT, Kind.COMPUTED_WEIGHTS, Kind.FROZEN_BATCHNORM,
         Kind.JOINED_PARAMETERS},
    ),
}  # fmt: skip


def list_lacking(found: Check) -> set[Kind]:
    return {remark.kind for remark in found.remarks} & LACKING


def read_calls(found: Check) -> tuple[str, str, BatchNormMode | None]:
    """Read our call, PyTorch's call and the mode of BatchNormalization from the last advice."""
    (remark,) = (remark for remark in found.remarks if remark.kind is Kind.EXPORT_CALL)
    ours, theirs = remark.sentence.split(" makes and checks")[0], remark.sentence.split("it is ")[1]
    call, *options = theirs.split(" and --batchnorm ")
    return ours, call, "train" if options else None


@pytest.mark.parametrize("name", CASES)
def test_the_first_call_lacks_what_the_advised_ones_keep(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    build, example, call, lacking = CASES[name]
    torch.manual_seed(0)
    call(build(), example)
    found = check("plain.onnx")
    assert list_lacking(found) == lacking
    ours, theirs, mode = read_calls(found)
    cut("plain.onnx", at=None)
    assert ours in caplog.text
    assert re.sub("'model.onnx'.*", "", theirs) in caplog.text
    names = {"splitonnx": splitonnx, "torch": torch, "example": example}
    for advised, batchnorm in ((theirs, mode), (ours, None)):
        Path("model.onnx").unlink(missing_ok=True)
        eval(advised, names | {"model": build()})
        found = check("model.onnx")
        assert list_lacking(found) <= ({Kind.FROZEN_BATCHNORM} if batchnorm else set())
        data = {found_name: example.numpy() for found_name in read_inputs("model.onnx")}
        data["labels"] = np.arange(len(example)) % 5
        bundle = cut("model.onnx", at=None, batchnorm=batchnorm, check=True)
        assert verify(bundle, data, steps=1, batch_size=4).ok
    assert found.statistics > 0


def read_inputs(path: str) -> list[str]:
    from splitonnx.partitioner.gate.gates import open_model

    graph = open_model(path).graph
    return [value.name or "" for value in graph.inputs if value.name not in graph.initializers]
