"""Opsets, operators and functions: what is not known, or has no end, is refused."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper

from splitonnx.errors import ModelError, NotAModel, UnsupportedModel
from splitonnx.graph_limits import MODEL
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.gate.operators import check_operators, check_opsets
from tests.partitioner.gate.broken_models import Breakage, hold_refusal, make_model
from tests.support.zoo import FLOAT, Net


def drop_opset(model: ModelProto) -> None:
    del model.opset_import[:]


def raise_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 99


def custom_operator(model: ModelProto) -> None:
    model.graph.node[1].domain = "com.evil"


def unknown_operator(model: ModelProto) -> None:
    model.graph.node[1].op_type = "Explode"


def training_operator(model: ModelProto) -> None:
    model.graph.node[1].domain = "com.microsoft"


def unknown_attribute(model: ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("speed", 11))


def recursion(model: ModelProto) -> None:
    body = helper.make_node("Again", ["a"], ["b"], domain="mine")
    model.functions.append(
        helper.make_function("mine", "Again", ["a"], ["b"], [body], list(model.opset_import))
    )
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Again", "mine"


BROKEN: list[Breakage] = [
    (drop_opset, NotAModel, "opset"),
    (raise_opset, UnsupportedModel, "opset 99"),
    (custom_operator, UnsupportedModel, "com.evil"),
    (unknown_operator, UnsupportedModel, "Explode"),
    (training_operator, UnsupportedModel, "com.microsoft"),
    (unknown_attribute, NotAModel, "speed"),
    (recursion, UnsupportedModel, "calls itself"),
]


@pytest.mark.parametrize(
    ("break_it", "kind", "reason"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_model_is_refused_in_one_line(
    break_it: Callable[[ModelProto], None], kind: type[ModelError], reason: str
) -> None:
    hold_refusal(break_it, kind, reason)


def test_functions_of_the_model_itself_are_taken() -> None:
    model = make_model()
    body = helper.make_node("Relu", ["a"], ["b"])
    model.functions.append(
        helper.make_function("mine", "Rectify", ["a"], ["b"], [body], list(model.opset_import))
    )
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Rectify", "mine"
    onnx.checker.check_model(model)
    assert FLOAT == TensorProto.FLOAT
    assert len(list(open_model(model).graph)) == len(model.graph.node)


@pytest.mark.parametrize("operator", ["Concat", "Sum"])
def test_a_node_has_a_bounded_number_of_inputs(operator: str) -> None:
    def build(count: int) -> ModelProto:
        net = Net()
        attributes = {"axis": 1} if operator == "Concat" else {}
        net.op(operator, *["x"] * count, out="y", **attributes)
        return net.finish({"x": (FLOAT, ["N", 1])}, "y", count if attributes else 1)

    open_model(build(4096))
    with pytest.raises(UnsupportedModel, match=rf"'y_node' \({operator}\): it has 4097 inputs; at"):
        open_model(build(4097))


def imports(**versions: int) -> list[onnx.OperatorSetIdProto]:
    return [helper.make_opsetid(domain, version) for domain, version in versions.items()]


def test_the_opset_is_that_of_onnxs_own_operators() -> None:
    own = [helper.make_opsetid("ai.onnx", 18), helper.make_opsetid("mine", 3)]
    assert check_opsets(own, "the model") == 18
    assert check_opsets(imports(mine=3), "a function", 17) == 17
    newest = onnx.defs.onnx_opset_version()
    assert check_opsets([helper.make_opsetid("", newest)], "the model") == newest
    with pytest.raises(UnsupportedModel, match=f"opset {newest + 1} is not known"):
        check_opsets([helper.make_opsetid("", newest + 1)], "the model")
    with pytest.raises(UnsupportedModel, match="opset 0"):
        check_opsets([helper.make_opsetid("", 0)], "the model")
    twice = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx", 17)]
    with pytest.raises(NotAModel, match="two opsets"):
        check_opsets(twice, "the model")


@pytest.mark.parametrize(
    ("kind", "attributes", "reason"),
    [
        ("MaxPool", {"kernel_shape": [2, 0]}, "kernel_shape below 1"),
        ("MaxPool", {"kernel_shape": [2], "strides": [0]}, "strides below 1"),
        ("Softmax", {"axis": 33}, "an axis that no tensor has"),
        ("Softmax", {"axis": -(2**40)}, "an axis that no tensor has"),
        ("Cast", {"to": 999}, "an unknown data type"),
        ("GatherND", {"batch_dims": -1}, "-1 batch dimensions"),
        ("Einsum", {"equation": "ab->(a"}, "no equation of letters"),
        ("Constant", {}, "exactly one value"),
        ("Pad", {"mode": b"\xff"}, "is not text"),
    ],
)
def test_attributes_that_native_code_would_trip_over_are_refused(
    kind: str, attributes: dict[str, object], reason: str
) -> None:
    model = make_model()
    inputs = [] if kind == "Constant" else ["x", "x"][: 2 if kind == "GatherND" else 1]
    model.graph.node.append(helper.make_node(kind, inputs, ["odd"], name="odd", **attributes))  # type: ignore[arg-type]
    with pytest.raises(NotAModel, match=reason):
        check_operators(model, 18, "the model")


@pytest.mark.parametrize("equation", ["ab,bc->ac", "...ij, ...jk -> ...ik", "ii", "a,b"])
def test_equations_of_letters_are_taken(equation: str) -> None:
    model = make_model()
    node = helper.make_node("Einsum", ["x", "x"], ["odd"], equation=equation)
    model.graph.node.append(node)
    check_operators(model, 18, "the model")


def call_functions(model: ModelProto, count: int, fan: int) -> ModelProto:
    """Functions in a row, each of which calls the next one so many times."""
    own = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    for index in range(count):
        last = index == count - 1
        kind, domain = ("Neg", "") if last else (f"F{index + 1}", "mine")
        nodes = [helper.make_node(kind, ["a"], [f"b{i}"], domain=domain) for i in range(fan)]
        function = helper.make_function("mine", f"F{index}", ["a"], ["b0"], nodes, own)
        model.functions.append(function)
    model.graph.node.append(helper.make_node("F0", ["x"], ["odd"], domain="mine"))
    return model


def test_functions_may_call_one_another_up_to_a_depth() -> None:
    check_operators(call_functions(make_model(), 20, 1), 18, "the model")
    with pytest.raises(UnsupportedModel, match=f"over {MODEL.depth} deep"):
        check_operators(call_functions(make_model(), MODEL.depth + 2, 1), 18, "the model")


def test_functions_that_expand_without_end_are_counted_before_they_do() -> None:
    with pytest.raises(UnsupportedModel, match=f"at most {MODEL.nodes} are taken"):
        check_operators(call_functions(make_model(), 30, 10), 18, "the model")  # 10 ** 30 nodes


def test_a_call_gives_no_more_than_the_function_takes() -> None:
    model = call_functions(make_model(), 1, 1)
    model.graph.node[-1].input.append("x")
    with pytest.raises(NotAModel, match="gives or asks more than its function has"):
        check_operators(model, 18, "the model")


def test_a_function_is_declared_once() -> None:
    model = call_functions(make_model(), 1, 1)
    model.functions.append(model.functions[0])
    with pytest.raises(NotAModel, match="declares the function 'F0' twice"):
        check_operators(model, 18, "the model")


def test_an_operator_that_its_opset_has_no_longer_is_refused() -> None:
    model = make_model()
    model.graph.node.append(helper.make_node("Upsample", ["x", "x"], ["odd"], name="odd"))
    with pytest.raises(UnsupportedModel, match="opset 18 no longer has it"):
        check_operators(model, 18, "the model")


RESULTS = {
    "Loop": """last, other, rows = Loop <body = step (int64 i, bool on, float[N] a, float[N] b) =>
        (bool again, float[N] c, float[N] d, float[N] e)
        { again = Identity (on)  c = Add (a, b)  d = Identity (a)  e = Identity (c) }
    > (most, , x, x)""",
    "Scan": """last, other, rows = Scan <num_scan_inputs = 1, body = step (float[N] a, float[N] b)
        => (float[N] c, float[N] d, float[N] e)
        { c = Add (a, b)  d = Identity (a)  e = Identity (c) }
    > (x, rows_given)""",
    "If": """last, other, rows = If <
        then_branch = one () => (float[N] c, float[N] d, float[N] e)
        { c = Neg (x)  d = Abs (x)  e = Exp (x) },
        else_branch = two () => (float[N] f, float[N] g, float[N] h)
        { f = Exp (x)  g = Neg (x)  h = Abs (x) }
    > (chosen)""",
}


def write_results(kind: str, outputs: list[str]) -> ModelProto:
    model = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 18]>
        results (float[N] x, float[T, N] rows_given, int64 most, bool chosen) => (float[N] y)
        {{ {RESULTS[kind]}  y = Neg (last) }}"""
    )
    node = next(node for node in model.graph.node if node.op_type == kind)
    node.name = "flow"
    del node.output[:]
    node.output.extend(outputs)
    return model


@pytest.mark.parametrize("outputs", [["last"], ["last", "other"], ["last", "other", "rows", "s"]])
@pytest.mark.parametrize("kind", RESULTS)
def test_a_node_has_an_output_for_each_result_of_its_body(kind: str, outputs: list[str]) -> None:
    check_operators(write_results(kind, ["last", "other", "rows"]), 18, "the model")
    check_operators(write_results(kind, ["last", "", ""]), 18, "the model")
    count = f"'flow' .{kind}. has {len(outputs)} outputs, but its body '(step|one)' computes 3"
    with pytest.raises(NotAModel, match=count):
        open_model(write_results(kind, outputs))


@pytest.mark.parametrize("kind", ["Scan", "If"])  # a Loop may end the process
def test_onnx_runtime_does_not_run_a_node_with_fewer_outputs_than_results(kind: str) -> None:
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.Fail):
        ort.InferenceSession(write_results(kind, ["last", "other"]).SerializeToString())
