"""Native code in a process of its own: it answers, refuses, breaks down, and is started anew."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import onnx
import pytest
from onnx import TensorProto, helper

from splitonnx import extras
from splitonnx.errors import MissingExtra, NativeCrash, ProcessFailed, WrongRuntime
from splitonnx.interrupts import noting_interrupts
from splitonnx.partitioner.differentiation.derived import derivations
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.inference.shapes import infer_shapes
from splitonnx.partitioner.native import main, natives, workers
from splitonnx.partitioner.native.requests import Kept
from splitonnx.partitioner.native.workers import Isolation, Refused, call
from splitonnx.partitioner.partitions import cut
from tests.conftest import ROOT
from tests.support.interrupts import lose_interrupt, taking_interrupts
from tests.support.zoo import ZOO


def build_split(parts: int) -> bytes:
    """Build a Split in three; told that they are fewer, onnx 1.23 reads beyond a vector."""
    node = helper.make_node("Split", ["x"], ["a", "b", "c"], axis=1, num_outputs=parts)
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, None]) for n in "abc"]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 9])]
    graph = helper.make_graph([node], "split", inputs, values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    content: bytes = model.SerializeToString()
    return content


def infer(content: bytes) -> list[int]:
    """Return the shape that native code infers of ``b``."""
    made = onnx.ModelProto.FromString(call(natives.infer_shapes, "the split", content, True))
    return [dim.dim_value for dim in made.graph.output[1].type.tensor_type.shape.dim]


def test_an_answer_comes_back() -> None:
    assert infer(build_split(3)) == [2, 3]


def test_no_call_begins_after_an_interrupt_whose_exception_was_discarded() -> None:
    with taking_interrupts(), noting_interrupts():
        lose_interrupt()
        with pytest.raises(KeyboardInterrupt):
            infer(build_split(3))
    assert infer(build_split(3)) == [2, 3]


def test_an_exception_comes_back_by_its_kind() -> None:
    node = helper.make_node("Explode", [], []).SerializeToString()
    with pytest.raises(Refused, match="Explode") as caught:
        call(natives.infer_node, "a node", node, {}, {}, 18)
    assert caught.value.kind == "SchemaError"


def test_a_model_that_ends_the_process_is_refused_and_the_next_one_is_served() -> None:
    for _ in range(2):
        with pytest.raises(
            NativeCrash, match="the split: onnx's inference of shapes broke down"
        ) as caught:
            infer(build_split(1))
        assert caught.value.is_breakdown
        assert infer(build_split(3)) == [2, 3]


def test_the_node_that_ends_the_process_is_named() -> None:
    model = onnx.ModelProto.FromString(build_split(1))
    for index in range(9):
        model.graph.node.insert(index, helper.make_node("Relu", ["x"], [f"r{index}"]))
        model.graph.node.append(helper.make_node("Relu", ["a"], [f"s{index}"]))
    with pytest.raises(NativeCrash, match=r"node 'a' \(Split\)"):
        open_model(model)


def test_one_process_serves_until_a_large_request() -> None:
    isolation = Isolation()
    pids = []
    for content in (build_split(3), build_split(3), bytes(1 << 27), build_split(3)):
        with suppress(Refused):
            isolation.call(natives.check_form, "the split", content)
        pids.append(isolation.pid)
    isolation.end()
    first, second, third, fourth = pids
    assert first == second != fourth
    assert third is None


def test_a_process_that_was_started_is_the_one_that_is_called() -> None:
    isolation = Isolation()
    isolation.start()
    started = isolation.pid
    assert started is not None
    isolation.start()
    isolation.call(natives.check_form, "the split", build_split(3))
    isolation.start()
    assert isolation.pid == started
    assert isolation.end() == "exit code 0"
    isolation.start()
    assert isolation.pid not in (None, started)
    isolation.end()


def test_a_process_that_ends_before_it_is_ready_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_MAIN", "this_module_is_nowhere")
    isolation = Isolation()
    isolation.start()
    with pytest.raises(ProcessFailed, match="exit code 1"):
        isolation.call(natives.check_form, "the split", build_split(3))


def test_a_content_is_kept_until_its_process_ends() -> None:
    isolation, kept = Isolation(), Kept(build_split(3))
    types = [isolation.call(natives.list_types, "it", kept) for _ in range(2)]  # type: ignore[arg-type]
    isolation.end()
    types.append(isolation.call(natives.list_types, "it", kept))  # type: ignore[arg-type]
    isolation.end()
    assert types == [dict.fromkeys("abc", "tensor(float)")] * 3


def test_an_interrupted_call_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    infer(build_split(3))
    with monkeypatch.context() as patch:
        patch.setattr(workers, "read_frame", interrupt)
        with pytest.raises(KeyboardInterrupt):
            call(natives.check_form, "the split", build_split(3))
    assert infer(build_split(3)) == [2, 3]


def interrupt(source: io.BytesIO) -> bytes:
    raise KeyboardInterrupt


def test_serving_ends_with_the_one_who_asks() -> None:
    answers = io.BytesIO()
    main.serve(io.BytesIO(b"\1\0\0\0\0\0\0\0"), answers)  # cut off within a request
    assert answers.getvalue() == bytes(8)  # ready, and nothing else


def test_a_process_that_cannot_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("", "/nowhere/python"):
        monkeypatch.setattr(sys, "executable", program)
        with pytest.raises(ProcessFailed, match="no process can be started"):
            Isolation().call(natives.check_form, "the split", b"")


@pytest.mark.skipif(os.name == "nt", reason="there is no fork")
def test_a_fork_has_a_process_of_its_own_and_nothing_is_left_on_stderr() -> None:
    script = """
import os
from splitonnx.partitioner.native.workers import _HERE, call
from tests.partitioner.native.test_workers import build_split, infer
infer(build_split(3))
mine = _HERE.pid
child = os.fork()
for _ in range(20):
    assert infer(build_split(3)) == [2, 3]
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert _HERE.pid == mine
else:
    assert _HERE.pid != mine
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_no_module_in_the_current_folder_is_taken_for_another(tmp_path: Path) -> None:
    """A model's folder may hold what its author wished."""
    (tmp_path / "onnx.py").write_text("raise SystemExit('taken in')")
    (tmp_path / "model.onnx").write_bytes(ZOO["chain"].build().SerializeToString())
    program = Path(sys.executable).parent / "splitonnx"
    done = subprocess.run(
        [program, "inspect", "model.onnx"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("kind", "error"), [("ModuleNotFoundError", MissingExtra), ("StockRuntime", WrongRuntime)]
)
def test_a_runtime_that_cannot_differentiate_is_told(
    kind: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise Refused(kind, "")

    monkeypatch.setattr(derivations, "call", refuse)
    with pytest.raises(error, match=r"splitonnx\[cpu\]"):
        cut(ZOO["chain"].build(), at="act1", loss="mse")


@pytest.mark.parametrize("kind", ["ModuleNotFoundError", "StockRuntime"])
def test_no_extra_is_advised_where_it_brings_no_gradients(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bytes:
        raise Refused(kind, "")

    monkeypatch.setattr(derivations, "call", refuse)
    for module in (derivations, extras):
        monkeypatch.setattr(module, "has_training_wheel", lambda: False)
    with pytest.raises(MissingExtra, match="cut the model on such a machine"):
        cut(ZOO["chain"].build(), at="act1", loss="mse")


def test_inference_leaves_inputs_and_initializers_as_they_are() -> None:
    model = open_model(ZOO["shape_paths"].build())
    before = [*model.graph.inputs], [*model.graph.initializers]
    infer_shapes(model)
    assert ([*model.graph.inputs], [*model.graph.initializers]) == before
    assert not any(value.is_graph_input() for value in model.graph.initializers.values())


def test_what_needs_too_much_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = msgspec.msgpack.encode(["MemoryError", "std::bad_alloc"])
    monkeypatch.setattr(workers._Worker, "ask", lambda worker, request: answer)
    isolation = Isolation()
    with pytest.raises(
        NativeCrash, match="the split: onnx's checker needs more memory than it"
    ) as caught:
        isolation.call(natives.check_form, "the split", build_split(3))
    assert not caught.value.is_breakdown
    isolation.end()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps the limit")
def test_a_request_is_limited_in_memory() -> None:
    script = """
from splitonnx.partitioner.native import main
main.BASE_BYTES = 1 << 28
main._limit_memory(1 << 20)
bytearray(1 << 28)
try:
    bytearray(1 << 30)
except MemoryError:
    print("limited")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "limited\n", done.stderr
