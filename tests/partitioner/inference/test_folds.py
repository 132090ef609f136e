"""What is known beforehand is computed beforehand; what depends on the batch stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.inference import evaluations, inferences
from splitonnx.partitioner.inference.folds import fold
from splitonnx.partitioner.inference.inferences import MOST_ELEMENTS

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


class Paths:
    """Nodes that lead from ``x`` (N, T, 6) to ``y``."""

    def __init__(self, dims: Sequence[int | str] = ("N", "T", 6), opset: int = 18) -> None:
        self.dims, self.opset = dims, opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str | Sequence[float], **attributes: Any) -> str:
        names = [name if isinstance(name, str) else self.constant(name) for name in inputs]
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [out], name=out, **attributes))
        return out

    def constant(self, values: Any) -> str:
        name = f"c{len(self.constants)}"
        array = np.array(values)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def size(self, axis: int, source: str = "x") -> str:
        return self.op("Gather", self.op("Shape", source), [axis])

    def build(self, output: str) -> onnx.ModelProto:
        self.nodes.append(helper.make_node("Identity", [output], ["y"], name="last"))
        graph = helper.make_graph(
            self.nodes,
            "paths",
            [helper.make_tensor_value_info("x", FLOAT, self.dims)],
            [helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)],
            self.constants,
        )
        graph.output[0].type.Clear()
        opset = helper.make_opsetid("", self.opset)
        proto = helper.make_model(graph, opset_imports=[opset], ir_version=8)
        return onnx.shape_inference.infer_shapes(proto)


def fold_checked(paths: Paths, output: str, *shapes: tuple[int, ...]) -> ir.Model:
    """Fold, hold the results against the original's for every shape, and give what is left."""
    proto = paths.build(output)
    model = ir.from_proto(proto)
    fold(model, ())
    original = onnxruntime.InferenceSession(proto.SerializeToString())
    folded = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for shape in shapes or ((2, 4, 6), (3, 5, 6), (1, 1, 6)):
        feed = {"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)}
        feed = {value.name: feed["x"] for value in folded.get_inputs()}
        (expected,) = original.run(None, feed or {"x": np.zeros(shape, np.float32)})
        (found,) = folded.run(None, feed)
        np.testing.assert_array_equal(found, expected)
    return model


def list_kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.op_type not in ("Constant", "Identity")]


def read_target(model: ir.Model, kind: str = "Reshape") -> list[int]:
    node = next(node for node in model.graph if node.op_type == kind)
    tensor = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] else None
    assert tensor is not None
    return [int(n) for n in tensor.numpy()]


def list_dims(model: ir.Model, name: str = "y") -> list[int | str | None]:
    value = next(v for node in model.graph for v in node.outputs if v.name == name)
    assert value.shape is not None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def test_a_view_to_the_batch_has_a_constant_target() -> None:
    paths = Paths()
    target = paths.op("Concat", paths.size(0), [-1], axis=0)
    model = fold_checked(paths, paths.op("Reshape", "x", target))
    assert list_kinds(model) == ["Reshape"]
    assert read_target(model) == [0, -1]
    assert list_dims(model) == ["N", "6*T"]


def test_heads_are_split_off_with_both_sizes_copied() -> None:
    paths = Paths()
    three = paths.op("Div", paths.size(2), [2])
    target = paths.op("Concat", paths.size(0), paths.size(1), [2], three, axis=0)
    model = fold_checked(paths, paths.op("Reshape", "x", target, allowzero=1))
    assert read_target(model) == [0, 0, 2, 3]
    assert list_dims(model) == ["N", "T", 2, 3]


def test_arithmetic_on_sizes_is_followed_to_the_end() -> None:
    paths = Paths(("N", 8, 10, 6))
    height, width = (paths.op("Cast", paths.size(axis), to=TensorProto.INT32) for axis in (1, 2))
    four = paths.constant(np.array([4], np.int32))
    rows = paths.op("Div", paths.op("Mul", height, width), four)  # H * W // 4
    rows = paths.op("Cast", rows, to=INT64)
    least = paths.op("Min", rows, paths.op("Mod", [47], [24]))
    target = paths.op("Concat", paths.size(0), rows, [-1], axis=0)
    added = paths.op("Cast", paths.op("Sub", rows, least), to=FLOAT)
    model = fold_checked(
        paths,
        paths.op("Add", paths.op("Reshape", "x", target), added),
        (2, 8, 10, 6),
        (1, 8, 10, 6),
    )
    assert list_kinds(model) == ["Reshape", "Add"]
    assert list_dims(model) == ["N", 20, 24]


def test_what_two_dimensions_leave_open_stays() -> None:
    paths = Paths()
    target = paths.op("Concat", paths.size(1), paths.size(0), [6], axis=0)
    model = fold_checked(paths, paths.op("Reshape", "x", target))
    assert list_kinds(model).count("Reshape") == 1
    assert "Shape" in list_kinds(model)
    assert list_dims(model) == ["T", "N", 6]


def test_a_target_with_a_true_zero_is_left_alone() -> None:
    paths = Paths()
    target = paths.op("Concat", paths.size(0), [0, 6], axis=0)
    empty = paths.op("Slice", "x", [0], [0], [1])  # (N, 0, 6)
    model = fold_checked(paths, paths.op("Reshape", empty, target, allowzero=1))
    assert "Concat" in list_kinds(model)


def test_an_expansion_as_torch_writes_it_keeps_only_what_it_needs() -> None:
    """torch.expand(n, -1, -1): sizes of -1 are replaced by 1 through Equal and Where."""
    paths = Paths()
    wanted = paths.op("Concat", paths.size(0), [-1, -1], axis=0)
    ones = paths.op("ConstantOfShape", paths.op("Shape", wanted),
                    value=numpy_helper.from_array(np.array([1])))  # fmt: skip
    least = paths.op("Equal", wanted, paths.op("Mul", ones, [-1]))
    target = paths.op("Where", least, ones, wanted)
    token = paths.constant(np.ones((1, 1, 6), np.float32))
    model = fold_checked(paths, paths.op("Expand", token, target))
    assert "Equal" not in list_kinds(model)
    assert list_dims(model) == ["N", 1, 6]


def test_an_expansion_to_the_own_size_has_a_constant_target() -> None:
    paths = Paths(("N", 1, 6))
    target = paths.op("Concat", paths.size(0), [4, 6], axis=0)
    model = fold_checked(paths, paths.op("Expand", "x", target), (2, 1, 6), (3, 1, 6))
    assert list_kinds(model) == ["Expand"]
    assert read_target(model, "Expand") == [1, 4, 6]


def test_a_mask_of_a_fixed_length_is_a_constant() -> None:
    paths = Paths(("N", 5, 6))
    length = paths.size(1)
    square = paths.op("Concat", length, length, axis=0)
    full = paths.op("ConstantOfShape", square, value=numpy_helper.from_array(np.array([1.0], "f4")))
    mask = paths.op("Trilu", full, upper=0)
    row = paths.op("MatMul", mask, "x")
    model = fold_checked(paths, row, (2, 5, 6))
    assert list_kinds(model) == ["MatMul"]


def test_positions_of_an_open_length_keep_that_length() -> None:
    paths = Paths()
    count = paths.op("Squeeze", paths.size(1), [0])
    zero, one = paths.constant(0), paths.constant(1)
    places = paths.op("Range", zero, count, one)
    model = fold_checked(paths, paths.op("Unsqueeze", places, [0]))
    assert "Range" in list_kinds(model)
    assert list_dims(model) == [1, "T"]


@pytest.mark.parametrize(
    ("starts", "ends", "steps", "dims"),
    [
        ([0], [2**63 - 1], [1], "T"),
        ([0], [-1], [1], None),  # T - 1, or 0 where T is 0
        ([-1], [2**63 - 1], [1], None),
        ([1], [1], [1], 0),
        ([0], [2**63 - 1], [2], None),
        ([-1], [-(2**63)], [-1], "T"),
    ],
)
def test_slices_of_an_open_dimension(
    starts: list[int], ends: list[int], steps: list[int], dims: int | str | None
) -> None:
    paths = Paths()
    model = fold_checked(paths, paths.op("Slice", "x", starts, ends, [1], steps))
    found = list_dims(model)
    assert (found[0], found[2]) == ("N", 6)
    assert found[1] == dims if dims is not None else "unk__" in str(found[1])


def test_a_slice_to_the_own_size_keeps_the_dimension() -> None:
    paths = Paths()
    model = fold_checked(paths, paths.op("Slice", "x", [0], paths.size(1), [1]))
    assert list_dims(model) == ["N", "T", 6]


def test_joined_tiled_and_flattened_dimensions_are_sums_and_products() -> None:
    paths = Paths()
    joined = paths.op("Concat", "x", paths.op("Slice", "x", [0], [1], [2]), axis=2)
    joined = paths.op("Concat", "x", joined, axis=2)
    tiled = paths.op("Tile", joined, [2, 1, 1])
    model = fold_checked(paths, paths.op("Flatten", tiled, axis=2))
    assert list_dims(model) == ["2*N*T", 13]


def test_a_branch_of_equal_length_keeps_the_batch_through_additions() -> None:
    """onnx's own inference loses the dimension at the Expand, and with it everything after."""
    paths = Paths()
    target = paths.op("Concat", paths.size(0), paths.size(1), [6], axis=0)
    more = paths.op("Expand", paths.constant(np.float32(1)), target)
    added = paths.op("Add", "x", more)
    again = paths.op("Concat", paths.size(0, added), [-1], axis=0)
    model = fold_checked(paths, paths.op("Reshape", added, again))
    assert read_target(model) == [0, -1]
    assert list_dims(model) == ["N", "6*T"]


def test_large_constants_are_not_written_out() -> None:
    paths = Paths()
    side = int(np.sqrt(MOST_ELEMENTS)) + 1
    big = paths.op("ConstantOfShape", [side, side])
    total = paths.op("ReduceSum", big, [0, 1], keepdims=0)
    model = fold_checked(paths, paths.op("Add", "x", total))
    assert "ConstantOfShape" in list_kinds(model)


def test_what_is_drawn_at_random_is_not_folded() -> None:
    paths = Paths()
    noise = paths.op("RandomNormal", shape=[6], seed=1.0)
    proto = paths.build(paths.op("Add", "x", noise))
    model = ir.from_proto(proto)
    fold(model, ())
    assert list_kinds(model) == ["RandomNormal", "Add"]


def test_weights_are_not_folded() -> None:
    paths = Paths()
    turned = paths.op("Transpose", paths.constant(np.ones((3, 6), np.float32)), perm=[1, 0])
    proto = paths.build(paths.op("MatMul", "x", turned))
    weight = proto.graph.initializer.pop()
    proto.graph.input.append(helper.make_tensor_value_info(weight.name, FLOAT, weight.dims))
    model = ir.from_proto(proto)
    fold(model, [weight.name])
    assert list_kinds(model) == ["Transpose", "MatMul"]


def test_an_output_of_the_model_is_never_replaced() -> None:
    paths = Paths(("N", 4, 6))
    proto = paths.build(paths.op("Add", paths.size(1), [3]))
    proto.graph.node[-1].op_type = "Neg"
    model = ir.from_proto(proto)
    fold(model, ())
    assert [value.name for value in model.graph.outputs] == ["y"]
    folded = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    assert folded.run(None, {"x": np.zeros((2, 4, 6), np.float32)})[0].tolist() == [-7]


def test_a_dimension_without_a_name_is_like_no_other() -> None:
    paths = Paths()
    proto = paths.build("x")
    proto.graph.input[0].type.tensor_type.shape.dim[0].ClearField("dim_param")
    proto.graph.input[0].type.tensor_type.shape.dim[1].ClearField("dim_param")
    model = ir.from_proto(proto)
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    fold(model, ())
    first, second, last = list_dims(model)
    assert "unk__" in str(first)
    assert "unk__" in str(second)
    assert first != second
    assert last == 6


@pytest.mark.parametrize(("start", "limit", "delta"), [(0, 1e12, 1), (0, -1e12, -1), (0, 1, 1e-12)])
def test_a_long_range_of_floats_is_not_computed_beforehand(
    start: float, limit: float, delta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inferences, "evaluate", pytest.fail)
    values = [
        ir.Value(name=f"c{i}", const_value=ir.tensor(np.float32(each)), shape=ir.Shape([]),
                 type=ir.TensorType(ir.DataType.FLOAT))
        for i, each in enumerate((start, limit, delta))
    ]  # fmt: skip
    node = ir.node("Range", values, name="range")
    node.outputs[0].name = "row"
    known = inferences.Inference(18)
    known.visit(node)
    assert known.content(node.outputs[0]) is None


def test_a_constant_is_handed_on_without_onnx_s_reference_implementation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def spy(node: ir.Node, *rest: Any) -> Sequence[np.ndarray | None]:
        asked.append(node.op_type)
        return evaluations.evaluate(node, *rest)

    monkeypatch.setattr(inferences, "evaluate", spy)
    value = ir.Value(name="c", const_value=ir.tensor(np.arange(3, dtype=np.float32), name="c"))
    nodes = [ir.node("Identity", [value])]
    nodes.append(ir.node("Neg", nodes[0].outputs))
    known = inferences.Inference(18)
    for node in nodes:
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape([3])
        known.visit(node)
    handed_on, negated = (known.constant(node.outputs[0]) for node in nodes)
    assert handed_on is not None
    assert negated is not None
    np.testing.assert_array_equal(handed_on, np.arange(3, dtype=np.float32))
    np.testing.assert_array_equal(negated, -handed_on)
    assert asked == ["Neg"]


@pytest.mark.parametrize("dims", [("N", "T", 6), (2, 4, 6)])
def test_the_number_of_sizes_is_known_also_where_every_size_is(dims: Sequence[int | str]) -> None:
    """The shape of fixed sizes becomes a constant, though it was declared of unknown length."""
    paths = Paths(dims)
    shape = paths.op("Shape", "x")
    proto = paths.build(paths.op("Mul", "x", paths.op("Cast", paths.op("Size", shape), to=FLOAT)))
    for value in proto.graph.value_info:
        if value.name == shape:
            value.type.tensor_type.shape.dim[0].dim_param = "unk__0"
    model = ir.from_proto(proto)
    fold(model, ())
    assert list_kinds(model) == ["Mul"]


def test_shapes_in_a_body_follow_from_constants_around_it() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model("""
            <ir_version: 9, opset_import: ["" : 18]>
            bodies (float[N, 6] x, bool c) => (float[A, B] y) <int64[3] to = {-1, 2, 3}> {
                y = If (c) <
                    then_branch = one () => (float[A, B] y1) {
                        r = Reshape (x, to)  t = Transpose <perm = [2, 1, 0]> (r)
                        k = NonZero (r)  f = Cast <to = 1> (k)  y1 = Identity (x)
                    },
                    else_branch = two () => (float[A, B] y2) { y2 = Identity (x) }
                >
            }""")
    )
    fold(model, [])
    noted = {v.name: v.shape for node in model.graph.all_nodes() for v in node.outputs}
    assert [str(noted[name]) for name in ("r", "t")] == ["[N,2,3]", "[3,2,N]"]
    assert noted["k"] is None  # how many columns it has is known only inside


@pytest.mark.parametrize(
    ("first", "step", "shape"),
    [
        ("float[N, 3] x", "e = Reshape (d, rows)", "[N,3]"),
        ("float[N, 3] x", "k = Concat <axis = 1> (d, d)  e = Reshape (k, rows)", "None"),
        ("float x", "e = Mul (d, d)", "[]"),
        ("float x", "e = Reshape (d, rows)", "None"),
    ],
)
def test_what_a_loop_carries_has_its_first_shape_if_each_iteration_keeps_it(
    first: str, step: str, shape: str
) -> None:
    model = ir.from_proto(
        onnx.parser.parse_model(f"""
            <ir_version: 9, opset_import: ["" : 18]>
            loops ({first}, int64 most) => (float[A, B] y) <int64[2] rows = {{-1, 3}}> {{
                y = Loop <body = one (int64 i, bool go, float d) => (bool on, float e) {{
                    on = Identity (go)  {step}
                }}> (most, , x)
            }}""")
    )
    body = model.graph.node(0).attributes["body"].as_graph()
    body.inputs[2].shape = body.outputs[1].shape = None
    fold(model, [])
    assert str(body.inputs[2].shape) == shape
