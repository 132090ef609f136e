"""Tests of following data through stage graphs, on graphs made by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from splitonnx.bundles import PartyBundle
from splitonnx.manifests import (
    FORMAT,
    PartyManifest,
    Phase,
    Role,
    Source,
    Stage,
    StageInput,
    StateSpec,
)
from splitonnx.names import CLIENT, PORTABLE, TRAIN
from splitonnx.runtime.client.flows import Extent, Flow, Layer
from splitonnx.tensors import TensorSpec

WEIGHT = TensorSpec(name="w", dtype="F32", shape=(2, 2))
Inputs = dict[str, Source]


def make_flow(*stages: tuple[Inputs, list[onnx.NodeProto], tuple[str, ...]]) -> Flow:
    """Make the flow of a phase from each stage's inputs, nodes and outputs."""
    graphs, declared = {}, []
    for place, (inputs, nodes, outputs) in enumerate(stages):
        name = f"stage{place}"
        values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in inputs]
        results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
        opsets = [helper.make_opsetid("", 18)]
        graph = helper.make_graph(nodes, name, values, results)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        graphs[f"{name}.onnx"] = model.SerializeToString()
        declared.append(
            Stage(
                name=name,
                graph=f"{name}.onnx",
                inputs=tuple(StageInput(name=n, source=s) for n, s in inputs.items()),
                outputs=outputs,
            )
        )
    phase = Phase(name=TRAIN, stages=tuple(declared))
    manifest = PartyManifest(
        format=FORMAT,
        party=CLIENT,
        digest="",
        target=PORTABLE,
        phases=(phase,),
        state=(StateSpec(tensor=WEIGHT, role=Role.PARAMETER),),
        files={},
        learning_rate=0.1,
    )
    party = PartyBundle(manifest=manifest, graphs=graphs, weights={"w": np.zeros((2, 2))})
    return Flow(party, phase)


def node(operator: str, reads: str, makes: str) -> onnx.NodeProto:
    return helper.make_node(operator, reads.split(), makes.split(), name=f"{makes}_node")


def test_a_tensor_that_reads_other_data_does_not_depend_on_an_array() -> None:
    inputs = {"x": Source.DATA, "y": Source.DATA, "w": Source.STATE}
    flow = make_flow((inputs, [node("MatMul", "x w", "h"), node("Relu", "y", "r")], ("h", "r")))
    assert flow.find_dependence("x", "r") is None
    assert flow.find_dependence("y", "h") is None
    assert flow.count_dependent("y", ["h", "r"]) == 1


def test_a_path_leads_through_what_a_later_stage_reads_again() -> None:
    first = ({"x": Source.DATA, "w": Source.STATE}, [node("MatMul", "x w", "kept")], ("kept",))
    # an inner name of the first stage may mean something else here
    second = ({"kept": Source.STASH}, [node("Relu", "kept", "sent")], ("sent",))
    for stages in ((first, second), (second, first)):
        found = make_flow(*stages).find_dependence("x", "sent")
        assert found is not None
        assert found.layers == (Layer(node="kept_node", operator="MatMul", weights=("w",)),)
        assert not found.is_bare


def test_equal_names_within_different_stages_are_different_values() -> None:
    first = ({"x": Source.DATA}, [node("Relu", "x", "inner"), node("Abs", "inner", "a")], ("a",))
    second = ({"y": Source.DATA}, [node("Relu", "y", "inner"), node("Abs", "inner", "b")], ("b",))
    flow = make_flow(first, second)
    assert flow.find_dependence("x", "b") is None
    assert flow.find_dependence("x", "a") is not None


def test_the_sizes_of_an_array_are_told_from_its_values() -> None:
    nodes = [node("Shape", "x", "s"), node("Cast", "s", "sent")]
    nodes[1].attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    found = make_flow(({"x": Source.DATA}, nodes, ("sent",))).find_dependence("x", "sent")
    assert found is not None
    assert found.extent is Extent.SIZES


def test_a_way_for_sizes_beside_weights_is_not_one_for_values() -> None:
    nodes = [
        node("MatMul", "x w", "h"),
        node("Shape", "x", "s"),
        node("Expand", "w s", "sized"),
        node("Expand", "h s", "sent"),
    ]
    inputs = {"x": Source.DATA, "w": Source.STATE}
    flow = make_flow((inputs, nodes, ("sent", "sized")))
    found, sized = flow.find_dependence("x", "sent"), flow.find_dependence("x", "sized")
    assert found is not None
    assert (found.extent, found.is_bare) == (Extent.VALUES, False)
    assert [layer.node for layer in found.layers] == ["h_node"]
    assert sized is not None
    assert (sized.extent, sized.layers) == (Extent.SIZES, ())


def test_a_way_past_the_weights_is_seen_beside_one_through_them() -> None:
    nodes = [node("MatMul", "x w", "h"), node("Add", "h x", "sent")]
    inputs = {"x": Source.DATA, "w": Source.STATE}
    found = make_flow((inputs, nodes, ("sent",))).find_dependence("x", "sent")
    assert found is not None
    assert found.is_bare
    assert [layer.node for layer in found.layers] == ["h_node"]


@pytest.mark.parametrize("operator", ["Add", "Mul", "Max"])
def test_a_weight_that_mixes_no_numbers_is_no_layer(operator: str) -> None:
    nodes = [node(operator, "x w", "h"), node("Relu", "h", "sent")]
    inputs = {"x": Source.DATA, "w": Source.STATE}
    found = make_flow((inputs, nodes, ("sent",))).find_dependence("x", "sent")
    assert found is not None
    assert found.tells_values
    assert found.layers == ()


def test_a_weight_stays_one_through_its_own_preparation() -> None:
    nodes = [node("Transpose", "w", "wt"), node("MatMul", "x wt", "h"), node("Relu", "h", "sent")]
    inputs = {"x": Source.DATA, "w": Source.STATE}
    found = make_flow((inputs, nodes, ("sent",))).find_dependence("x", "sent")
    assert found is not None
    assert found.layers == (Layer(node="h_node", operator="MatMul", weights=("w",)),)
    assert not found.is_bare


def test_an_array_that_is_handed_through_is_bare() -> None:
    found = make_flow(({"x": Source.DATA}, [node("Relu", "x", "r")], ("r", "x"))).find_dependence(
        "x", "x"
    )
    assert found is not None
    assert (found.is_bare, found.layers) == (True, ())


def test_what_a_branch_mentions_is_read_by_its_node() -> None:
    def branch(name: str, body: list[onnx.NodeProto]) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        return helper.make_graph(body, name, [], [output])

    taken = branch("then", [node("Relu", "x", "then_out")])
    other = branch("else", [node("Relu", "y", "else_out")])
    choice = helper.make_node("If", ["c"], ["sent"], then_branch=taken, else_branch=other)
    inputs = dict.fromkeys(("c", "x", "y", "z"), Source.DATA)
    flow = make_flow((inputs, [choice], ("sent",)))
    assert all(flow.find_dependence(name, "sent") is not None for name in "cxy")
    assert flow.find_dependence("z", "sent") is None
