"""Graphs written down: to the byte what onnx-ir writes, whatever stands in them."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from splitonnx.partitioner.graphs.transcripts import write_graph, write_model
from tests.support.node_cases import list_node_cases
from tests.support.zoo import FLOAT, ZOO, Net


def write_by_onnx_ir(graph: ir.Graph) -> bytes:
    proto = ir.to_proto(ir.Model(graph, ir_version=10, producer_name="tests"))
    content: bytes = proto.SerializeToString()
    return content


@pytest.mark.parametrize("name", ZOO)
def test_a_model_is_written_as_onnx_ir_writes_it(name: str) -> None:
    model = ir.from_proto(ZOO[name].build())
    assert write_model(model).SerializeToString() == ir.to_proto(model).SerializeToString()


@pytest.mark.parametrize(
    "operator", ["Cast", "Constant", "Dropout", "If", "Loop", "Optional", "Scan", "SequenceAt"]
)
def test_bodies_attributes_and_types_that_are_no_tensors_are_written_alike(operator: str) -> None:
    for case in list_node_cases(operator):
        model = ir.from_proto(case.model)
        assert write_model(model).SerializeToString() == ir.to_proto(model).SerializeToString()


def build_noted() -> onnx.ModelProto:
    """A model with notes on all that may bear one, a quantization, and an output left out."""
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w", 6, 6), out="hidden")
    net.op("MaxPool", hidden, out="output", kernel_shape=[1])
    model = net.finish({"x": (FLOAT, ["N", 6, 6])}, "output", 6, 6)
    graph = model.graph
    graph.node[1].output.append("")
    for noted in (model, graph, graph.node[0], graph.input[0]):
        noted.doc_string = "a note"
        noted.metadata_props.add(key="b", value="2")
        noted.metadata_props.add(key="a", value="1")
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph.value_info.append(helper.make_tensor_value_info("hidden", TensorProto.FLOAT, None))
    annotation = graph.quantization_annotation.add(tensor_name="hidden")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    return model


def test_notes_and_quantizations_are_written_alike() -> None:
    model = ir.from_proto(build_noted())
    written = write_model(model)
    assert written.SerializeToString() == ir.to_proto(model).SerializeToString()
    assert written.graph.quantization_annotation
    assert written.graph.node[0].metadata_props


@pytest.mark.parametrize("name", ZOO)
def test_a_view_is_written_as_its_clone_is(name: str) -> None:
    graph = ir.from_proto(ZOO[name].build()).graph
    nodes = list(graph)[1:-1]
    made = {value: None for node in nodes for value in node.outputs}
    read = {v: None for node in nodes for v in node.inputs if v is not None and v not in made}
    view = ir.GraphView(
        [value for value in read if not value.is_initializer()],
        list(made),
        nodes=nodes,
        initializers=[value for value in read if value.is_initializer()],
        opset_imports=dict(graph.opset_imports),
        name="view",
    )
    assert write_graph(view, 10, "tests").SerializeToString() == write_by_onnx_ir(view.clone())


def test_a_model_with_functions_is_written_alike() -> None:
    model = ir.from_proto(ZOO["chain"].build())
    node = ir.Node("own", "Twice", [model.graph.inputs[0]])
    model.graph.append(node)
    body = ir.Graph([ir.Value(name="a")], [], nodes=[], opset_imports={"": 18})
    twice = ir.node("Add", [body.inputs[0], body.inputs[0]])
    twice.outputs[0].name = node.outputs[0].name = "twice"
    body.append(twice)
    body.outputs.append(twice.outputs[0])
    function = ir.Function("own", "Twice", graph=body, attributes=[])
    model.functions[function.identifier()] = function
    assert write_model(model).functions
    assert write_model(model).SerializeToString() == ir.to_proto(model).SerializeToString()
