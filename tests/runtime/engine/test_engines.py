import gc
import os
import subprocess
import sys

import numpy as np
import pytest
from onnx import NodeProto, helper

from splitonnx.errors import ForbiddenGraph, StageFailed, WrongRuntime
from splitonnx.manifests import Source, StageInput
from splitonnx.runtime.engine import engines
from splitonnx.runtime.engine.builds.installed import InstalledRuntime
from splitonnx.runtime.engine.engines import Engine
from tests.support import tiny
from tests.support.quantized_graphs import X, build_quantized, compute_quantized

ENGINE = Engine(threads=1)
DTYPES = ["?", "u1", "i1", "u2", "i2", "f2", "u4", "i4", "f4", "u8", "i8", "f8"]


def graph(*nodes: NodeProto, inputs: str, outputs: str) -> bytes:
    declared = tuple(StageInput(name=name, source=Source.DATA) for name in inputs.split())
    return tiny.make_graph(list(nodes), declared, tuple(outputs.split()))


ADD = graph(helper.make_node("Add", ["x", "w"], ["y"]), inputs="x w", outputs="y")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 3, 4)])
def test_arrays_go_in_and_come_out_the_same(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    back = ENGINE.to_array(ENGINE.from_array(array))
    assert back.dtype == array.dtype
    assert back.shape == shape
    np.testing.assert_array_equal(back, array)


def test_neither_way_copies_and_what_comes_out_is_read_only() -> None:
    array = np.ones(3, np.float32)
    back = ENGINE.to_array(ENGINE.from_array(array))
    assert np.shares_memory(array, back)
    with pytest.raises(ValueError, match="read-only"):
        back[0] = 2


def test_a_strided_array_arrives_in_the_right_order() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    np.testing.assert_array_equal(ENGINE.to_array(ENGINE.from_array(array)), array)


@pytest.mark.parametrize("training", [True, False])
def test_a_stage_gives_its_outputs_by_name(training: bool) -> None:
    stage = ENGINE.load("add", ADD, training=training)
    feeds = {"x": ENGINE.from_array(np.ones((2, 3), np.float32))}
    feeds["w"] = ENGINE.from_array(np.arange(3, dtype=np.float32))
    outputs = ENGINE.run(stage, feeds)
    assert list(outputs) == ["y"]
    np.testing.assert_array_equal(ENGINE.to_array(outputs["y"]), [[1, 2, 3]] * 2)


@pytest.mark.parametrize("training", [True, False])
def test_a_quantized_stage_computes_what_its_graph_says(training: bool) -> None:
    """With ONNX Runtime's usual settings, the Softmax is off by two percent of its largest."""
    stage = ENGINE.load("predict", build_quantized(), training=training)
    outputs = ENGINE.run(stage, {"x": ENGINE.from_array(X)})
    for name, expected in compute_quantized(X).items():
        np.testing.assert_allclose(ENGINE.to_array(outputs[name]), expected, atol=1e-6)


def test_a_quantized_stage_in_ort_format_computes_what_its_graph_says() -> None:
    engine = Engine(threads=1, trusted=True)
    content = engine.convert("predict", build_quantized(), training=False)
    stage = engine.load("predict", content, training=False)
    outputs = engine.run(stage, {"x": engine.from_array(X)})
    for name, expected in compute_quantized(X).items():
        np.testing.assert_allclose(engine.to_array(outputs[name]), expected, atol=1e-6)


def test_an_output_outlives_its_stage_and_an_input_that_is_an_output_its_array() -> None:
    constant = helper.make_node("Constant", [], ["c"], value_floats=[1.0, 2.0, 3.0])
    stage = ENGINE.load("pass", graph(constant, inputs="x", outputs="x c"), training=False)
    feed = ENGINE.from_array(np.arange(50_000, dtype=np.float32))
    arrays = {n: ENGINE.to_array(t) for n, t in ENGINE.run(stage, {"x": feed}).items()}
    del stage, feed
    gc.collect()
    np.testing.assert_array_equal(arrays["c"], [1, 2, 3])
    np.testing.assert_array_equal(arrays["x"], np.arange(50_000))


def test_an_output_does_not_keep_the_others_of_its_run_alive() -> None:
    large = helper.make_node("Add", ["x", "x"], ["large"])
    small = helper.make_node("ReduceMean", ["large"], ["small"], keepdims=0)
    stage = ENGINE.load(
        "step", graph(large, small, inputs="x", outputs="large small"), training=True
    )
    feeds = {"x": ENGINE.from_array(np.ones(1 << 20, np.float32))}
    kept, places = [], set()
    for _ in range(3):
        outputs = ENGINE.run(stage, feeds)
        places.add(outputs.pop("large").__array_interface__["data"])
        kept.append(outputs)
    assert len(places) == 1  # its memory was free to be used again


@pytest.mark.parametrize(
    ("feeds", "reason"),
    [
        ({"x": np.ones((2, 3), np.float32), "w": np.ones(2, np.float32)}, "broadcast"),
        ({"x": np.ones(3), "w": np.ones(3, np.float32)}, "tensor.double"),
        ({"x": np.ones(3, np.float32)}, r"'w'.* are missing"),
        ({"x": np.ones(3, np.float32), "v": np.ones(3, np.float32)}, "missing"),
    ],
)
def test_a_stage_that_cannot_run_is_named_with_the_reason_on_one_line(
    feeds: dict[str, np.ndarray], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    stage = ENGINE.load("head.forward", ADD, training=True)
    tensors = {name: ENGINE.from_array(array) for name, array in feeds.items()}
    with pytest.raises(StageFailed, match=f"^stage 'head.forward' failed: .*{reason}") as caught:
        ENGINE.run(stage, tensors)
    assert "\n" not in str(caught.value)
    assert "ONNXRuntimeError" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_bytes_that_are_no_graph_are_refused() -> None:
    with pytest.raises(ForbiddenGraph, match=r"^the graph of stage 'head\.forward' is not run"):
        ENGINE.load("head.forward", b"no graph", training=True)


@pytest.mark.parametrize(
    "message",
    [
        "FAIL : Fatal error: com.microsoft:ReluGrad(-1) is not a registered function/op",
        'In Node, ("", ReluGrad, "", -1) : Error No Op registered for ReluGrad with domain_version',
    ],
)
def test_a_training_operator_on_the_stock_runtime_says_what_to_install(
    message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = InstalledRuntime(version="1.32.0", training=False)
    monkeypatch.setattr(engines, "installed_runtime", lambda: stock)
    with pytest.raises(WrongRuntime, match=r"onnxruntime 1.32.0,.*ReluGrad.*splitonnx\[cpu\]"):
        engines._refuse("head.backward", RuntimeError(message))


def test_an_operator_unknown_to_the_training_runtime_is_a_failed_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = InstalledRuntime(version="1.19.2", training=True)
    monkeypatch.setattr(engines, "installed_runtime", lambda: training)
    # the gate knows the name, but in that domain there is no such operator
    nonsense = graph(helper.make_node("ReluGrad", ["x", "x"], ["y"]), inputs="x", outputs="y")
    with pytest.raises(StageFailed, match="ReluGrad"):
        ENGINE.load("head.forward", nonsense, training=False)


BOUND = """
import os, pathlib
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from tests.runtime.engine.test_engines import ADD, Engine
tasks = pathlib.Path("/proc/self/task")
before = len([*tasks.iterdir()])
stage = Engine().load("add", ADD, training=True)
print(len([*tasks.iterdir()]) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="there is one core")
def test_a_process_bound_to_a_core_computes_in_no_other_thread() -> None:
    done = subprocess.run([sys.executable, "-c", BOUND], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "0"
