"""What cut writes, the gate before ONNX Runtime lets pass: else cutting is what fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from splitonnx.commands import main
from splitonnx.errors import ForbiddenOperator, UnsupportedModel
from splitonnx.names import Target
from splitonnx.partitioner.cutting import assemblies
from splitonnx.partitioner.cutting.joints import JointGraph
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.cutting.stages import StageCut
from splitonnx.partitioner.cutting.verdicts import check_operators
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.gate.gates import check_graph
from tests.support.case_trials import TARGETS
from tests.support.zoo import FLOAT, Net


def build() -> onnx.ModelProto:
    net = Net(opset=20)
    net.op("MatMul", "x", net.weight("w1", 4, 4), out="a")
    net.op("ReduceMax", "x", out="top", keepdims=0)
    net.op("Greater", "top", net.constant("none", np.array(0, np.float32)), out="hot")
    bodies = [
        helper.make_graph(
            [helper.make_node(kind, ["x"], [kind])], "body", [],
            [helper.make_tensor_value_info(kind, FLOAT, ["N", 4])],
        )
        for kind in ("Neg", "Abs")
    ]  # fmt: skip
    net.op("If", "hot", out="b", then_branch=bodies[0], else_branch=bodies[1])
    net.op("Add", "a", "b", out="h")
    net.op("MatMul", "h", net.weight("w2", 4, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 4])}, "scores", 3)


def spoil_node(graph: ir.Graph) -> None:
    node = next(node for node in graph if node.op_type == "MatMul")
    node.op_type, node.domain = "LSTMTraining", "com.microsoft"
    graph.opset_imports["com.microsoft"] = 1


def spoil_domain(graph: ir.Graph) -> None:
    next(node for node in graph if node.op_type == "MatMul").domain = "org.example"
    graph.opset_imports["org.example"] = 1


def spoil_body(graph: ir.Graph) -> None:
    (branching,) = (node for node in graph if node.op_type == "If")
    (node,) = branching.attributes["then_branch"].as_graph()
    node.op_type = "NegTraining"


def spoil_import(graph: ir.Graph) -> None:
    next(node for node in graph if node.op_type == "MatMul").domain = "com.microsoft"
    graph.opset_imports.pop("com.microsoft", None)


def spoil_opset(graph: ir.Graph) -> None:
    graph.opset_imports[""] = 22


FAULTS: dict[str, tuple[Callable[[ir.Graph], None], str]] = {
    "a training operator": (spoil_node, "'a_node' is LSTMTraining of the domain 'com.microsoft'"),
    "a foreign domain": (spoil_domain, "'a_node' is MatMul of the domain 'org.example'"),
    "an operator in a body": (spoil_body, "is NegTraining of the domain 'ai.onnx'"),
    "a domain that is not imported": (spoil_import, "MatMul of the domain 'com.microsoft'"),
    "a later opset": (spoil_opset, "in version 22"),
}


def plant(patch: pytest.MonkeyPatch, spoil: Callable[[ir.Graph], None]) -> None:
    """Make a mistake in every graph for prediction, on the way to the bundle."""
    cut_stages = assemblies._cut_phase

    def cut_phase(joint: JointGraph) -> list[StageCut]:
        if not joint.gradients:
            spoil(joint.graph)
        return cut_stages(joint)

    patch.setattr(assemblies, "_cut_phase", cut_phase)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_operator_that_the_runtime_refuses_is_an_internal_error(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, sentence = FAULTS[fault]
    plant(monkeypatch, spoil)
    with pytest.raises(ForbiddenOperator, match=f"internal error.*'model.predict'.*{sentence}"):
        cut(build(), at=None)


def test_a_mistake_leaves_no_bundle_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plant(monkeypatch, spoil_node)
    onnx.save(build(), tmp_path / "model.onnx")
    arguments = [
        "cut",
        str(tmp_path / "model.onnx"),
        "--at",
        "h",
        "--send-labels",
        "--send-input",
        "x",
        "-o",
        str(tmp_path / "bundle"),
    ]
    monkeypatch.setattr("sys.argv", ["splitonnx", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    written = capsys.readouterr()
    assert "internal error of splitonnx, no bundle is written" in written.err
    assert written.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def spoil_branch(graph: ir.Graph) -> None:
    (branching,) = (node for node in graph if node.op_type == "If")
    (node,) = branching.attributes["then_branch"].as_graph()
    node.op_type, node.domain = "FastGelu", "com.microsoft"
    graph.opset_imports["com.microsoft"] = 1


def test_a_portable_part_has_no_training_operator_in_a_body(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch, spoil_branch)
    found = {}
    for target in TARGETS:
        bundle = cut(build(), at=None, client_target=target)
        found[target] = b"FastGelu" in bundle.client.graphs["model.predict.onnx"]
    assert found == {"training": True, "portable": False}


def test_a_training_operator_that_was_not_lowered_is_refused_in_a_body() -> None:
    graph = prepare(open_model(build())).inference.graph
    spoil_branch(graph)
    check_operators("model.predict", graph, is_portable=False)
    with pytest.raises(ForbiddenOperator, match="FastGelu"):
        check_operators("model.predict", graph, is_portable=True)


@pytest.mark.parametrize("target", ["training", "portable"])
def test_the_gate_passes_what_is_written(target: Target) -> None:
    bundle = cut(build(), at="h", client_target=target, server_target=target)
    for party in bundle.parties.values():
        for name, graph in party.graphs.items():
            check_graph(name, graph)


LONG = "n" * (1 << 20)


def note_node(model: onnx.ModelProto, text: str) -> None:
    model.graph.node[0].doc_string = text


def note_graph(model: onnx.ModelProto, text: str) -> None:
    model.graph.doc_string = text


def note_input(model: onnx.ModelProto, text: str) -> None:
    model.graph.input[0].doc_string = text.replace("nn", "é")  # two bytes, too


def note_metadata(model: onnx.ModelProto, text: str) -> None:
    model.graph.node[0].metadata_props.add(key="trace", value=text)


def add_constant(model: onnx.ModelProto, text: str) -> None:
    model.graph.node.append(helper.make_node("Constant", [], ["text"], value_string=text))


def add_tensor(model: onnx.ModelProto, text: str) -> None:
    tensor = TensorProto(name="text", data_type=TensorProto.STRING, dims=[1])
    tensor.string_data.append(text.encode())
    model.graph.initializer.append(tensor)


@pytest.mark.parametrize(
    "write", [note_node, note_graph, note_input, note_metadata, add_constant, add_tensor]
)
def test_a_text_that_the_gate_takes_for_too_long_is_refused_when_a_model_is_cut(
    write: Callable[[onnx.ModelProto, str], None],
) -> None:
    model = build()
    write(model, LONG)
    bundle = cut(model, at=None)
    for name, graph in bundle.client.graphs.items():
        check_graph(name, graph)
    model = build()
    write(model, f"{LONG}.")
    with pytest.raises(UnsupportedModel, match="a text of 1048577 bytes; at most 1048576"):
        cut(model, at=None)
