"""What kernels would end the process over is an error of the stage, and the server lives.

The cases run in a process of their own, so that a signal is a test's failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.testing import assert_allclose
from onnx.reference import ReferenceEvaluator

from splitonnx.names import Target
from splitonnx.partitioner.cutting.conformance.dataflow import NotRun, run_session
from splitonnx.partitioner.cutting.safeguards import is_bound
from splitonnx.partitioner.inference.dimensions import make_atom, parse_dim
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.executors import Executor
from tests.conftest import build_once
from tests.support.crash_cases import (
    CASES,
    ENGINE,
    LIAR,
    TOO_SMALL,
    build_language_model,
    floats,
    perform,
)
from tests.support.zoo import FLOAT, INT64, ZOO, Net

Run = tuple[int, dict[str, str]]
"""The exit status of all cases of a target, and the end of each of their tasks."""


@pytest.fixture
def ran(target: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What came of all cases in one child, once for pytest's processes; a crash ends it."""
    made = build_once(
        tmp_path_factory, f"crash-cases-{target}", lambda folder: run_cases(target, folder)
    )
    status, ends = json.loads(made.read_text())
    return status, ends


def run_cases(target: str, folder: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.crash_cases", target],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    ends = dict(line.split(": ") for line in done.stdout.splitlines())
    made = folder / "ends.json"
    made.write_text(json.dumps([done.returncode, ends]))
    return made


@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize("name", CASES)
def test_data_that_would_crash_a_kernel_fail_the_stage(name: str, ran: Run) -> None:
    status, ends = ran
    assert ends[f"{name}, train good"] == ends[f"{name}, predict good"] == "done"
    assert ends[f"{name}, train bad"] == CASES[name].end
    assert ends[f"{name}, predict bad"] in (CASES[name].end, "StageFailed", "done")
    assert status == 0


@pytest.mark.parametrize("target", ["training", "portable"])
@pytest.mark.parametrize("name", TOO_SMALL)
def test_an_image_of_which_a_pooling_has_no_rows_is_refused(name: str, ran: Run) -> None:
    status, ends = ran
    assert ends[f"{name}, predict bad"] == "StageFailed"
    assert status == 0


def build_pooling(operator: str, *dims: int | str, **attributes: Any) -> onnx.ModelProto:
    net = Net(opset=19)  # in which an AveragePool has dilations
    value = net.op(operator, "x", out="pooled", **attributes)
    value = net.op("Conv", value, net.weight("w1", 2, 1, 1, 1), out="filtered")
    value = net.op("ReduceMax", value, net.constant("space", np.array([2, 3])), out="m", keepdims=0)
    output = net.op("MatMul", value, net.weight("w2", 2, 2), out="scores")
    return net.finish({"x": (FLOAT, ["N", 1, *dims])}, output, 2)


def load_prediction(model: onnx.ModelProto) -> bytes:
    """Return the graph by which a client predicts that has all of a model."""
    client = cut(model, at=None, loss="mse").client
    (stage,) = client.manifest.phase("predict").stages
    return client.graphs[stage.graph]


@pytest.mark.parametrize("operator", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [3, 2], "strides": [2, 2]},
        {"kernel_shape": [5, 5], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [3, 3], "pads": [0, 1, 1, 0], "auto_pad": "NOTSET"},
        {"kernel_shape": [5, 4], "strides": [2, 3], "ceil_mode": 1},
        {"kernel_shape": [4, 4], "strides": [2, 2], "auto_pad": "VALID"},
        {"kernel_shape": [3, 2], "dilations": [2, 3]},
    ],
)
def test_the_images_refused_are_those_of_which_no_window_is_pooled(
    operator: str, attributes: dict[str, Any]
) -> None:
    net = Net(opset=19)
    net.op(operator, "x", out="y", **attributes)
    alone = net.finish({"x": (FLOAT, ["N", 1, "H", "W"])}, "y", 1, "R", "C").SerializeToString()
    guarded = onnx.load_from_string(
        load_prediction(build_pooling(operator, "H", "W", **attributes))
    )
    end = [node.op_type for node in guarded.graph.node].index(operator)
    del guarded.graph.node[end + 1 :]  # the rest needs weights, which the party adds
    evaluator = ReferenceEvaluator(guarded)
    for height, width in product(range(1, 8), repeat=2):
        x = floats(1, 1, height, width)
        try:
            (pooled,) = run_session(alone, [{"x": x}], "it", level="none")
            has_windows = pooled["y"].size > 0
        except NotRun:  # a negative size
            has_windows = False
        try:
            evaluator.run(["pooled"], {"x": x})
            is_refused = False
        except IndexError:
            is_refused = True
        assert is_refused != has_windows, (height, width)


@pytest.mark.parametrize(
    ("dims", "attributes"),
    [
        ((4, 4), {"kernel_shape": [2, 2]}),
        (("2*H", "H + 1"), {"kernel_shape": [2, 2]}),
        (("H", "W"), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}),
        (("H", "W"), {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER"}),
    ],
)
def test_a_pooling_for_which_no_image_is_too_small_gets_no_check(
    dims: tuple[int | str, ...], attributes: dict[str, Any]
) -> None:
    assert b"/checked" not in load_prediction(build_pooling("MaxPool", *dims, **attributes))


@pytest.mark.parametrize("target", ["training", "portable"])
def test_a_server_that_lies_ends_no_client(ran: Run) -> None:
    status, ends = ran
    assert ends[f"{LIAR}, predict bad"] == "done"  # it samples near the image
    assert status == 0


def test_names_that_the_parties_bind_are_at_least_one() -> None:
    n, t = make_atom("N"), make_atom("T")
    for dim in (1, n, n * t * 3, n + 1):
        assert is_bound(dim), dim
    unknown = parse_dim("unk__h:1")
    for dim in (0, n - 1, unknown, n * parse_dim("(T)//(2)"), t + unknown):
        assert not is_bound(dim), dim


@pytest.mark.parametrize("name", ["convolutions", "attention", "shape_paths"])
def test_a_graph_whose_sizes_are_bound_is_left_as_it_is(name: str) -> None:
    entry = ZOO[name]
    bundle = cut(entry.build(), at=None, loss=entry.loss)
    for content in bundle.client.graphs.values():
        names = [node.name for node in onnx.load_from_string(content).graph.node]
        assert not [node for node in names if "/checked" in node]


def test_labels_to_be_ignored_stay_so() -> None:
    bundle = cut(build_language_model(ignore_index=-100), at=("h", "tokens"), loss="from-model")
    assert bundle.server is not None
    wires = {"h@server": floats(2, 3, 6), "tokens@server": np.array([[0, 4, -100], [2, -100, 0]])}
    assert perform(Executor(bundle.server, ENGINE), "train", wires) == "done"


@pytest.mark.parametrize("corners", [0, 1])
def test_a_place_far_away_is_reflected_as_the_reference_reflects_it(corners: int) -> None:
    net = Net()
    net.opset = 20
    image = np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)
    sampled = net.op(
        "GridSample", net.constant("image", image), "grid", out="sampled",
        padding_mode="reflection", align_corners=corners,
    )  # fmt: skip
    felt = net.op("MatMul", sampled, net.weight("w", 3, 2), out="scores")
    model = net.finish({"grid": (FLOAT, [1, "H", 3, 2])}, felt, 1, "H", 2)
    places = [-413.3, -37.25, -2.5, 0.1, 3.75, 33.5, 98.6, 1000.25, 7.875]
    grid = np.array(places * 2, np.float32).reshape(1, 3, 3, 2)
    (expected,) = ReferenceEvaluator(model).run(None, {"grid": grid})
    assert isinstance(expected, np.ndarray)
    with Client(cut(model, at=None, loss="mse").client) as client:
        assert_allclose(client.predict({"grid": grid})["scores"], expected, atol=1e-3)


@pytest.mark.parametrize("target", ["training", "portable"])
def test_a_detector_that_keeps_no_box_predicts_the_sum_of_none(target: Target) -> None:
    net = Net()
    net.opset = 20
    image = net.constant("image", np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4))
    kept = net.op("Greater", "felt", net.constant("half", np.array(0.5, np.float32)), out="kept")
    boxes = net.op("Compress", "boxes", kept, out="some", axis=0)
    of = net.op("Compress", "of", kept, out="of_some", axis=0)
    made = net.op("RoiAlign", image, boxes, of, out="r", output_height=2, output_width=2)
    made = net.op("Flatten", made, out="flat")
    made = net.op("ReduceSum", made, net.constant("axes", np.array([0])), out="sum", keepdims=1)
    output = net.op("MatMul", made, net.weight("w", 4, 2), out="scores")
    inputs: dict[str, tuple[int, list[int | str]]] = {
        "boxes": (FLOAT, ["R", 4]), "of": (INT64, ["R"]), "felt": (FLOAT, ["R"])
    }  # fmt: skip
    model = net.finish(inputs, output, 2)
    client = Client(cut(model, at=None, loss="mse", client_target=target).client)
    for felt in (1.0, 0.0):
        data = {"boxes": np.array([[0, 0, 2, 2]], np.float32), "of": np.array([0]),
                "felt": np.array([felt], np.float32)}  # fmt: skip
        expected = np.zeros((1, 2), np.float32)  # what the reference evaluator has no answer to
        if felt:
            (expected,) = ReferenceEvaluator(model).run(None, data)  # type: ignore[assignment]
        assert_allclose(client.predict(data)["scores"], expected, rtol=1e-5)
