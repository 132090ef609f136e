"""Ports: one Identity on each crossing edge, which only the receiving side reads behind."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.manifests import WireKind
from splitonnx.names import CLIENT, SERVER
from splitonnx.partitioner.cutting.cuts import divide
from splitonnx.partitioner.cutting.passes.given_names import resolve_names
from splitonnx.partitioner.cutting.ports import Port, declare, insert_ports
from splitonnx.partitioner.graphs.traversals import list_inner, map_values, walk_back
from splitonnx.partitioner.partitions import cut
from splitonnx.tensors import TensorSpec
from tests.support.zoo import FLOAT, ZOO, Net


def cut_graph(
    name: str, at: list[str], tail_at: list[str], labels: str | None = None
) -> tuple[ir.Graph, list[Port], set[ir.Node]]:
    graph = ir.from_proto(ZOO[name].build()).graph
    first, last = resolve_names(graph, at), resolve_names(graph, tail_at)
    partition = divide(graph, first, last, state=frozenset())
    server = set(partition.server)
    return graph, insert_ports(graph, partition, server, [labels] if labels else ()), server


def find_readers(graph: ir.Graph, name: str) -> set[str]:
    return {use.node.name or "" for use in map_values(graph)[name].uses()}


def test_what_the_client_sends_is_named_after_the_server() -> None:
    graph, ports, server = cut_graph("chain", ["act1"], [])
    (port,) = ports
    assert (port.value.name, port.sender, port.receiver) == ("act1@server", CLIENT, SERVER)
    assert port.kind is WireKind.ACTIVATION
    assert find_readers(graph, "act1") == {"act1@server/port"}
    assert {use.node for use in port.value.uses()} <= server


def test_what_comes_back_is_named_after_the_client() -> None:
    _, ports, server = cut_graph("chain", ["act0"], ["act1"])
    assert [port.value.name for port in ports] == ["act0@server", "act1@client"]
    assert (ports[1].sender, ports[1].receiver) == (SERVER, CLIENT)
    assert not {use.node for use in ports[1].value.uses()} & server


def test_a_raw_input_that_crosses_is_of_kind_input() -> None:
    graph, ports, _ = cut_graph("two_inputs", ["ta", "b"], [])
    kinds = {port.value.name: port.kind for port in ports}
    assert kinds == {"ta@server": WireKind.ACTIVATION, "b@server": WireKind.INPUT}
    assert find_readers(graph, "b") == {"b@server/port"}


def test_the_sending_side_reads_on_without_the_port() -> None:
    """A skip connection of the client around the server stays with the tensor itself."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 3]))
    nodes = []

    def write(kind: str, name: str, *inputs: ir.Value) -> ir.Value:
        node = ir.node(kind, inputs, name=name)
        node.outputs[0].name, node.outputs[0].type = f"{name}.y", x.type
        node.outputs[0].shape = x.shape
        nodes.append(node)
        return node.outputs[0]

    first = write("Tanh", "first", x)
    middle = write("Sigmoid", "middle", first)
    last = write("Add", "last", middle, first)
    graph = ir.Graph([x], [last], nodes=nodes, opset_imports={"": 18}, name="skip")
    partition = divide(graph, [first], [middle], state=frozenset())
    insert_ports(graph, partition, partition.server)
    assert find_readers(graph, "first.y") == {"first.y@server/port", "last"}
    assert find_readers(graph, "first.y@server") == {"middle"}
    assert find_readers(graph, "middle.y@client") == {"last"}


def test_type_and_shape_of_a_wire_are_those_of_its_tensor() -> None:
    graph, (port,), _ = cut_graph("chain", ["act1"], [])
    value = map_values(graph)["act1"]
    assert (port.value.dtype, port.value.shape) == (value.dtype, value.shape)


def test_a_cut_tensor_that_is_a_model_output_stays_one_by_name() -> None:
    graph = ir.from_proto(ZOO["chain"].build()).graph
    (output,) = graph.outputs
    name = output.name or ""
    values = map_values(graph)
    partition = divide(graph, [values["act0"]], [output], state=frozenset())
    ports = insert_ports(graph, partition, partition.server)
    assert [value.name for value in graph.outputs] == [name]
    made = graph.outputs[0].producer()
    assert made is not None
    assert made not in partition.server  # the client makes the output out of what it received
    assert ports[1].value.name == f"{name}@client"
    assert ports[1].value in walk_back([graph.outputs[0]])[1] | set(made.inputs)


def test_labels_cross_only_where_the_server_reads_them() -> None:
    graph = ir.from_proto(ZOO["two_inputs"].build()).graph
    values = map_values(graph)
    partition = divide(graph, [values["ta"], values["b"]], state=frozenset())
    assert len(insert_ports(graph, partition, set(), ["a"])) == 2
    graph = ir.from_proto(ZOO["two_inputs"].build()).graph
    partition = divide(graph, [map_values(graph)["both"]], state=frozenset())
    ports = insert_ports(graph, partition, set(graph), ["a"])
    assert [port.value.name for port in ports] == ["both@server", "a@server"]
    assert ports[1].kind is WireKind.INPUT


def test_a_body_of_the_server_reads_the_port() -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3]))
    first = ir.node("Tanh", [x], name="first")
    h = first.outputs[0]
    h.name, h.type, h.shape = "h", x.type, x.shape
    go = ir.Value(name="go", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))

    def body(kind: str) -> ir.Graph:
        inner = ir.node("Neg", [h], name=f"{kind}.inner")
        inner.outputs[0].name = f"{kind}.y"
        return ir.Graph([], inner.outputs, nodes=[inner], opset_imports={"": 18}, name=kind)

    choice = ir.node(
        "If",
        [go],
        {"then_branch": body("then"), "else_branch": body("else")},
        name="choice",
    )
    choice.outputs[0].name, choice.outputs[0].type = "y", x.type
    graph = ir.Graph([x, go], choice.outputs, nodes=[first, choice], opset_imports={"": 18},
                     name="g")  # fmt: skip
    partition = divide(graph, [h, go], state=frozenset())
    insert_ports(graph, partition, partition.server)
    read = [inner.inputs[0].name for inner in list_inner(choice) if inner.inputs[0]]
    assert read == ["h@server", "h@server"]
    assert [use.node.op_type for use in h.uses()] == ["Identity"]


def make_value(dtype: ir.DataType | None, *dims: int | str | None) -> ir.Value:
    kind = None if dtype is None else ir.TensorType(dtype)
    return ir.Value(name="h", type=kind, shape=ir.Shape(dims))


def test_a_value_is_declared_with_its_type_and_dimensions() -> None:
    spec = declare(make_value(ir.DataType.FLOAT16, "N", 3))
    assert spec == TensorSpec(name="h", dtype="F16", shape=("N", 3))
    assert declare(make_value(ir.DataType.INT64), "labels").name == "labels"


def test_dimensions_without_a_name_get_one_of_their_own() -> None:
    spec = declare(make_value(ir.DataType.FLOAT, None, 3, None))
    first, middle, last = spec.shape
    assert isinstance(first, str)
    assert isinstance(last, str)
    assert (middle, first == last) == (3, False)


def test_what_is_not_known_cannot_travel() -> None:
    with pytest.raises(UsageError, match="'h' cannot travel"):
        declare(make_value(None, 3))
    with pytest.raises(UsageError, match="'h' cannot travel"):
        declare(ir.Value(name="h", type=ir.TensorType(ir.DataType.FLOAT)))
    with pytest.raises(UsageError, match="'h' cannot travel"):
        declare(make_value(ir.DataType.STRING, 3))


def test_a_sequence_cannot_travel_and_is_named_as_in_the_model() -> None:
    kind = ir.SequenceType(ir.TensorType(ir.DataType.FLOAT))
    value = ir.Value(name="listed@server", type=kind, shape=ir.Shape([3]))
    with pytest.raises(UsageError, match="'listed' cannot travel: it is a sequence"):
        declare(value)


def test_an_output_of_unknown_rank_is_no_fault_of_a_cut_and_named_with_what_fixes_it() -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 4, 5), out="h")
    net.op("MatMul", "h", net.weight("v", 5, 3), out="y")
    net.op("Squeeze", "h", out="s")
    model = net.finish({"x": (FLOAT, ["N", 4])}, "y", 3)
    model.graph.output.append(onnx.helper.make_tensor_value_info("s", FLOAT, [5]))
    told = r"output 's': the number of its dimensions is not known; .* --dim N=SIZE fixes"
    for at in (None, "h"):
        with pytest.raises(UnsupportedModel, match=told):
            cut(model, at=at)
    assert cut(model, at=None, dims={"N": 2}).client.manifest.outputs[1].shape == (2, 5)


def test_an_input_of_a_type_that_data_cannot_have_is_refused_as_such() -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 4, 3), out="y")
    model = net.finish({"x": (FLOAT, ["N", 4]), "q": (onnx.TensorProto.COMPLEX64, ["N"])}, "y", 3)
    with pytest.raises(UnsupportedModel, match="input 'q': its elements are COMPLEX64, and data"):
        cut(model, at=None)
