"""Operators, opsets and functions that are unknown, nested without end, or too many."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto, TensorProto, helper

from tests.support.hostile.entries import (
    add_function,
    chain,
    dump,
    hostile,
    make_if,
    make_loop,
    put_behind,
    raw,
)
from tests.support.zoo import FLOAT


@hostile("com.evil")
def custom_operator(model: ModelProto) -> None:
    model.graph.node[1].domain = "com.evil"


@hostile("com.microsoft")
def operator_of_the_runtime(model: ModelProto) -> None:
    model.graph.node[1].domain = "com.microsoft"


@hostile("com.evil")
def custom_operator_in_a_branch(model: ModelProto) -> None:
    node = helper.make_node("Spy", ["act1"], ["seen"], domain="com.evil")
    put_behind(model, make_if([node], "seen"))


@hostile("com.evil")
def custom_operator_in_a_branch_of_a_function(model: ModelProto) -> None:
    spy = helper.make_node("Spy", ["a"], ["seen"], domain="com.evil")
    constant = helper.make_node("Constant", [], ["yes"], value_int=1)
    cast = helper.make_node("Cast", ["yes"], ["condition"], to=TensorProto.BOOL)
    add_function(model, "Wrap", [constant, cast, make_if([spy], "seen", result="b")])
    put_behind(model, helper.make_node("Wrap", ["act1"], ["odd"], domain="mine"))


@hostile("no such operator")
def unknown_operator(model: ModelProto) -> None:
    model.graph.node[1].op_type = "Explode"


@hostile("opset 99")
def opset_99(model: ModelProto) -> None:
    model.opset_import[0].version = 99


@hostile("opset 0")
def opset_0(model: ModelProto) -> None:
    model.opset_import[0].version = 0


@hostile("opset -9223372036854775808")
def opset_below_zero(model: ModelProto) -> None:
    model.opset_import[0].version = -(2**63)


@hostile("two opsets")
def two_opsets(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("", 7))


@hostile("no opset")
def no_opset(model: ModelProto) -> None:
    del model.opset_import[:]


@hostile("calls itself")
def function_that_calls_itself(model: ModelProto) -> None:
    add_function(model, "Again", [helper.make_node("Again", ["a"], ["b"], domain="mine")])
    put_behind(model, helper.make_node("Again", ["act1"], ["odd"], domain="mine"))


@hostile("calls itself")
def functions_that_call_each_other(model: ModelProto) -> None:
    add_function(model, "Ping", [helper.make_node("Pong", ["a"], ["b"], domain="mine")])
    add_function(model, "Pong", [helper.make_node("Ping", ["a"], ["b"], domain="mine")])
    put_behind(model, helper.make_node("Ping", ["act1"], ["odd"], domain="mine"))


@hostile("nodes; at most")
def billion_laughs(model: ModelProto) -> None:
    for level in range(30):
        called, domain = (f"Laugh{level - 1}", "mine") if level else ("Relu", "")
        add_function(
            model,
            f"Laugh{level}",
            [
                helper.make_node(called, ["a"], ["m"], domain=domain),
                helper.make_node(called, ["m"], ["b"], domain=domain),
            ],
        )
    put_behind(model, helper.make_node("Laugh29", ["act1"], ["odd"], domain="mine"))


@hostile("deep")
def functions_nested_without_end(model: ModelProto) -> None:
    for level in range(5000):
        called, domain = (f"F{level + 1}", "mine") if level < 4999 else ("Relu", "")
        add_function(model, f"F{level}", [helper.make_node(called, ["a"], ["b"], domain=domain)])
    put_behind(model, helper.make_node("F0", ["act1"], ["odd"], domain="mine"))


@hostile("function 'Twice' twice")
def function_twice(model: ModelProto) -> None:
    for _ in range(2):
        add_function(model, "Twice", [helper.make_node("Relu", ["a"], ["b"])])


@hostile("(If) has 1 outputs, but its body 'then' computes 0")
def branch_that_gives_nothing(model: ModelProto) -> None:
    ends = [helper.make_tensor_value_info("bias", FLOAT, None)]
    made = [helper.make_node("Identity", ["b1"], ["bias"])]
    branches = {
        "then_branch": helper.make_graph(made, "then", [], []),
        "else_branch": helper.make_graph(made, "else", [], ends),
    }
    put_behind(model, helper.make_node("If", ["condition"], ["less"], **branches))
    put_behind(model, helper.make_node("Add", ["act1", "less"], ["odd"]), 5)


@hostile("")
def loop_of_ages(model: ModelProto) -> None:
    put_behind(model, make_loop(2**60))


@raw("nodes; at most")
def a_million_nodes(folder: Path) -> bytes:
    part = ModelProto()  # Protocol Buffers join the parts of a message that stand side by side
    part.graph.node.append(helper.make_node("Relu", ["act1"], ["odd"]))
    content: bytes = chain().SerializeToString() + dump(part) * 10**6
    return content
