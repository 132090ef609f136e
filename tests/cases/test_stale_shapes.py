"""Shapes that a file declares wrongly, since its inputs were changed or its exporter erred."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.errors import UnsupportedModel
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import inspect
from splitonnx.verifications import verify
from tests.conftest import ROOT
from tests.support.case_trials import TARGETS
from tests.support.nets import FLOAT, INT64, Net
from tests.support.small_models import Arrays, hold_predictions, hold_step


def build(**declared: list[int | str]) -> onnx.ModelProto:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 6, 5), out="h")
    net.op("Relu", "h", out="r")
    net.op("MatMul", "r", net.weight("v", 5, 3), out="y")
    model = net.finish({"x": (FLOAT, ["N", 6])}, "y", 3)
    for name, shape in declared.items():
        model.graph.value_info.append(helper.make_tensor_value_info(name, FLOAT, shape))
    return model


@pytest.mark.parametrize("target", TARGETS)
def test_a_batch_of_1_that_is_left_behind_a_freed_input_is_not_believed(target: Target) -> None:
    """As tools leave it that change the dimensions of inputs alone."""
    model = build(h=[1, 5], r=[1, 5])
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert [found.shape for found in inspect(model)] == [("N", 5), ("N", 5)]
    random = np.random.default_rng(0)
    data: Arrays = {
        "x": random.standard_normal((8, 6)).astype(np.float32),
        "labels": np.arange(8) % 3,
    }
    bundle = cut(model, at="h", client_target=target, server_target=target)
    hold_predictions(bundle, build(), {"x": data["x"]})
    assert verify(bundle, data, batch_size=4).ok


@pytest.mark.parametrize("shape", [["N", 7], ["N"], [1, "N", 5]])
def test_other_sizes_and_ranks_are_not_believed(shape: list[int | str]) -> None:
    assert [found.shape for found in inspect(build(h=shape))] == [("N", 5), ("N", 5)]


def test_a_size_that_only_the_file_knows_is_believed() -> None:
    model = build(h=["N", 5])
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"
    assert [found.shape for found in inspect(model)] == [("N", 5), ("N", 5)]


def test_an_export_that_declares_channels_last_has_them_first() -> None:
    found = {each.tensor: each.shape for each in inspect(ROOT / "tests/exports/jax-cnn.onnx")}
    assert found["relu_out_0"] == ("N", 4, 8, 8)


def build_with_bodies(kind: str, rows: int | str) -> onnx.ModelProto:
    """Build a model whose bodies declare that they have ``rows`` rows."""
    net = Net()
    value = helper.make_tensor_value_info
    net.op("MatMul", "x", net.weight("w", 6, 5), out="r")
    net.op("ReduceSum", "x", out="sum", keepdims=0)
    net.op("Greater", "sum", net.constant("none", np.array(0, np.float32)), out="hot")
    on = net.constant("on", np.array(True))
    net.weight("u", 5, 5)

    def write(operator: str, prefix: str, before: str) -> onnx.GraphProto:
        names = [f"{prefix}_m", f"{prefix}_f"]
        nodes = [
            helper.make_node("MatMul", [before, "u"], names[:1], name=names[0]),
            helper.make_node(operator, names[:1], names[1:], name=names[1]),
        ]
        made = [value(name, FLOAT, [rows, 5]) for name in names]
        return helper.make_graph(nodes, prefix, [], made[1:], value_info=made[:1])

    def write_loop(prefix: str) -> onnx.GraphProto:
        body = write("Tanh", prefix, f"{prefix}_old")
        body.node.append(helper.make_node("Identity", [f"{prefix}_on"], [f"{prefix}_again"]))
        given = value(f"{prefix}_on", TensorProto.BOOL, [])
        carried = value(f"{prefix}_old", FLOAT, [rows, 5])
        body.input.extend([value(f"{prefix}_i", INT64, []), given, carried])
        body.output.insert(0, value(f"{prefix}_again", TensorProto.BOOL, []))
        return body

    if kind == "If":
        branches = {"then_branch": write("Tanh", "a", "r"), "else_branch": write("Sin", "b", "r")}
        net.op("If", "hot", out="f", **branches)
    elif kind == "If whose condition is constant":
        branches = {"then_branch": write("Tanh", "a", "r"), "else_branch": write("Sin", "b", "r")}
        net.op("If", on, out="f", **branches)
    elif kind == "Loop":
        net.op("Cast", "hot", out="trips", to=INT64)
        net.op("Loop", "trips", on, "r", out="f", body=write_loop("a"))
    elif kind == "Loop in If":
        net.op("Cast", "hot", out="trips", to=INT64)
        node = helper.make_node("Loop", ["trips", on, "r"], ["l"], body=write_loop("a"), name="l")
        nested = helper.make_graph([node], "nested", [], [value("l", FLOAT, [rows, 5])])
        net.op("If", "hot", out="f", then_branch=nested, else_branch=write("Sin", "b", "r"))
    else:
        net.op("Unsqueeze", "r", net.constant("first", np.array([0])), out="one")
        net.op("Concat", "one", "one", out="steps", axis=0)
        body = write("Tanh", "a", "sum_of")
        body.node.insert(0, helper.make_node("Add", ["old", "step"], ["sum_of"], name="sum_of"))
        body.node.append(helper.make_node("Identity", ["a_f"], ["each"]))
        body.input.extend([value("old", FLOAT, [rows, 5]), value("step", FLOAT, [rows, 5])])
        body.output.append(value("each", FLOAT, [rows, 5]))
        outputs = ["f", "all"]
        node = helper.make_node("Scan", ["r", "steps"], outputs, body=body, num_scan_inputs=1)
        net.nodes.append(node)
    net.op("MatMul", "f", net.weight("v", 5, 4), out="h")
    net.op("MatMul", net.op("Relu", "h", out="p"), net.weight("z", 4, 3), out="y")
    inputs, ends = [value("x", FLOAT, ["N", 6])], [value("y", FLOAT, ["N", 3])]
    graph = helper.make_graph(net.nodes, kind, inputs, ends, net.weights)
    graph.value_info.append(value("f", FLOAT, [rows, 5]))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    "kind", ["If", "If whose condition is constant", "Loop", "Loop in If", "Scan"]
)
def test_a_batch_of_1_that_is_left_behind_in_a_body_is_not_believed(
    kind: str, target: Target, *, check: bool
) -> None:
    model, meant = build_with_bodies(kind, 1), build_with_bodies(kind, "N")
    x = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    freeze = ["^w$", "^u$"]
    for at in ("h", None):
        bundle = cut(
            model, at=at, freeze=freeze, client_target=target, server_target=target, check=check
        )
        hold_predictions(bundle, meant, {"x": x})
        hold_predictions(bundle, meant, {"x": -x})
        data: Arrays = {"x": x, "labels": np.arange(8) % 3}
        if at is not None:
            assert verify(bundle, data, batch_size=4).ok
        else:
            hold_step(bundle, meant, data, ["v", "z"])


def test_a_size_of_the_output_that_only_the_file_knows_has_to_be_right() -> None:
    net = Net()
    scores = net.op("MatMul", "x", net.weight("w", 6, 3), out="s")
    rows = net.op("Shape", "x", out="rows", start=0, end=1)
    count = net.op("Cast", net.op("ReduceSum", "x", out="sum", keepdims=0), out="c", to=INT64)
    nothing = net.op("Mul", count, net.constant("zero", np.array(0)), out="n")
    classes = net.op("Add", nothing, net.constant("three", np.array(3)), out="classes")
    classes = net.op("Unsqueeze", classes, net.constant("first", np.array([0])), out="column")
    net.op("Reshape", scores, net.op("Concat", rows, classes, out="shape", axis=0), out="y")
    for declared in (3, 7):
        model = net.finish({"x": (FLOAT, ["N", 6])}, "y", declared)
        if declared == 3:
            cut(model, at=None, check=True)
            continue
        with pytest.raises(UnsupportedModel, match=r"declares the sizes \['\?', 7\].* \[\d, 3\]"):
            cut(model, at=None, check=True)


BRANCHES: dict[str, tuple[str, list[int | str]]] = {
    "an Expand to a computed shape": (
        """
        five = Gather <axis = 0> (s, one)
        column = Unsqueeze (five, zero)
        value = Expand (unit, column)
        sizes = Shape (value)
        factor = Cast <to = 1> (sizes)""",
        [9],
    ),
    "a scalar": (
        """
        value = ReduceSum <keepdims = 0> (h)
        sizes = Shape (value)
        length = Size (sizes)
        number = Cast <to = 1> (length)
        factor = Add (number, value)""",
        ["N", 5, 7],
    ),
    "a vector declared as a scalar": (
        """
        value = ReduceSum <keepdims = 1> (h)
        sizes = Shape (value)
        length = Size (sizes)
        factor = Cast <to = 1> (length)""",
        [],
    ),
    "a Reshape to a computed shape": (
        """
        rows = Slice (s, zero, first)
        target = Concat <axis = 0> (rows, twenty)
        value = Reshape (h, target)
        sizes = Shape (value)
        last = Slice (sizes, first, second)
        factor = Cast <to = 1> (last)""",
        ["N", 7],
    ),
}
"""What a branch computes from a value whose shape the file may declare wrongly."""


def build_branches(case: str, *, is_stale: bool) -> onnx.ModelProto:
    nodes, shape = BRANCHES[case]
    dims = ", ".join(map(str, shape))
    declared = f"<float[{dims}] value>" if shape else "<float value>"
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 18]>
        branches (float[N, 5, 4] x) => (float[N, 5, 2] y)
        <int64 one = {{1}}, int64[1] zero = {{0}}, int64[1] first = {{1}}, int64[1] second = {{2}},
         int64[1] twenty = {{20}}, float[1] unit = {{1}}, float nothing = {{0}}> {{
            h = MatMul (x, w)
            s = Shape (h)
            mean = ReduceMean <keepdims = 0> (x)
            on = Greater (mean, nothing)
            b = If (on) <
                then_branch = then () => (float[N, 5, 4] a)
                    {declared if is_stale else ""} {{{nodes}
                    a = Mul (h, factor)
                }},
                else_branch = other () => (float[N, 5, 4] c) {{ c = Tanh (h) }}>
            y = MatMul (b, v)
        }}"""
    )
    random = np.random.default_rng(0)
    for name, size in (("w", (4, 4)), ("v", (4, 2))):
        array = random.standard_normal(size).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("case", BRANCHES)
def test_a_wrong_shape_within_a_branch_is_not_believed(case: str, *, check: bool) -> None:
    model, meant = (build_branches(case, is_stale=is_stale) for is_stale in (True, False))
    x = np.abs(np.random.default_rng(1).standard_normal((6, 5, 4))).astype(np.float32)
    (branch, *_) = [node for node in model.graph.node if node.op_type == "If"]
    assert [info.name for info in branch.attribute[0].g.value_info] == ["value"]
    bundle = cut(model, at="b", loss="mse", check=check)
    for data in (x, -x):
        hold_predictions(bundle, meant, {"x": data})


def test_a_size_that_no_inference_corrects_is_named_where_results_differ() -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 4, 4), out="h")
    most = net.op("Cast", net.op("ReduceMax", "h", out="most", keepdims=0), out="i", to=INT64)
    nothing = net.op("Mul", most, net.constant("zero", np.array(0)), out="n")
    axis = net.op("Add", nothing, net.constant("one", np.array([1])), out="axis")
    sizes = net.op("Shape", net.op("ReduceSum", "h", axis, out="sum", keepdims=0), out="sizes")
    factor = net.op("Cast", sizes, out="factor", to=FLOAT)
    factor = net.op("ReduceProd", net.op("Slice", factor, "one", "two", out="f"), out="p")
    net.constant("two", np.array([2]))
    net.op("MatMul", net.op("Mul", "h", factor, out="m"), net.weight("v", 4, 2), out="y")
    model = net.finish({"x": (FLOAT, ["N", 5, 4])}, "y", 5, 2)
    for declared in (4, 9):
        del model.graph.value_info[:]
        model.graph.value_info.append(helper.make_tensor_value_info("sum", FLOAT, ["N", declared]))
        if declared == 4:
            cut(model, at="h", loss="mse", check=True)
            continue
        with pytest.raises(UnsupportedModel) as caught:
            cut(model, at="h", loss="mse", check=True)
        assert str(caught.value) == (
            "tensor 'sum' of the model: its file declares the sizes ['?', 9], but it has [2, 4] "
            "when it runs; export it again, or delete the declared sizes"
        )
