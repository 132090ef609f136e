"""One node at a time: its types as onnx infers them, its contents as the evaluator says."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.errors import NativeCrash
from splitonnx.partitioner.inference import evaluations
from splitonnx.partitioner.inference.evaluations import Schemas, WeightValues, evaluate
from tests.conftest import ROOT, run

FLOAT = TensorProto.FLOAT


def make_node(kind: str, count: int, outputs: int = 1, **attributes: Any) -> ir.Node:
    inputs = [ir.Value(name=f"odd name {index}") for index in range(count)]
    node = ir.node(kind, inputs, attributes, num_outputs=outputs, name="node")
    for index, value in enumerate(node.outputs):
        value.name = f"out {index}"
    return node


def make_type(*dims: int | str) -> tuple[int, tuple[int | str, ...]]:
    return FLOAT, dims


def infer_types(
    node: ir.Node,
    types: Mapping[str, tuple[int, tuple[int | str, ...] | None]],
    data: Mapping[str, onnx.TensorProto],
    opset: int,
) -> Sequence[onnx.TypeProto | None]:
    return Schemas(opset).infer(node, types, data)


def read_dims(kind: onnx.TypeProto | None) -> list[int | str]:
    assert kind is not None
    return [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param
        for dim in kind.tensor_type.shape.dim
    ]


def test_a_nodes_types_follow_from_those_of_its_inputs() -> None:
    types = {"i0": make_type("N", 3), "i1": make_type(3, 5)}
    (made,) = infer_types(make_node("MatMul", 2), types, {}, 18)
    assert read_dims(made) == ["N", 5]
    assert made is not None
    assert made.tensor_type.elem_type == FLOAT


def test_contents_that_are_known_tell_more() -> None:
    types = {"i0": make_type(2, 6), "i1": (TensorProto.INT64, (2,))}
    shape = numpy_helper.from_array(np.array([3, -1]), "i1")
    (made,) = infer_types(make_node("Reshape", 2), types, {"i1": shape}, 18)
    assert read_dims(made) == [3, 4]


def test_every_output_has_its_type_and_an_unknown_one_none() -> None:
    node = make_node("Split", 1, 2, axis=1, num_outputs=2)
    left, right = infer_types(node, {"i0": make_type(2, 6)}, {}, 18)
    assert read_dims(left) == read_dims(right) == [2, 3]
    nothing = infer_types(make_node("Explode", 1, 2), {"i0": make_type(2)}, {}, 18)
    assert nothing == [None, None]


def test_a_node_of_many_contents_is_inferred_too() -> None:
    count = 3000
    types = {"i0": make_type(count), "i1": (TensorProto.INT64, (1,))}
    values = numpy_helper.from_array(np.arange(count, dtype=np.float32), "i0")
    shape = numpy_helper.from_array(np.array([count]), "i1")
    (made,) = infer_types(make_node("Reshape", 2), types, {"i0": values, "i1": shape}, 18)
    assert read_dims(made) == [count]


def test_a_crash_of_native_code_names_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*arguments: object) -> None:
        raise NativeCrash("a node", "it broke down")

    monkeypatch.setattr(evaluations, "call", crash)
    node = make_node("Relu", 1, alone=1)  # an attribute of no other test: not remembered
    with pytest.raises(NativeCrash, match=r"node 'node' \(Relu\)"):
        infer_types(node, {"i0": make_type(2, 7)}, {}, 18)


@pytest.mark.parametrize(
    ("kind", "inputs", "attributes", "expected"),
    [
        ("Add", [[1, 2], [10, 20]], {}, [11, 22]),
        ("Concat", [[1], [2, 3]], {"axis": 0}, [1, 2, 3]),
        ("Gather", [[5, 6, 7], [2, 0]], {"axis": 0}, [7, 5]),
        ("Div", [[7, -7], [2, 2]], {}, [3, -3]),
        ("Range", [0, 6, 2], {}, [0, 2, 4]),
    ],
)
def test_contents_are_computed_from_known_inputs(
    kind: str, inputs: list[Any], attributes: dict[str, Any], expected: list[int]
) -> None:
    node = make_node(kind, len(inputs), **attributes)
    (found,) = evaluate(node, [np.array(given) for given in inputs], 18)
    assert found is not None
    assert found.tolist() == expected


def test_an_input_that_is_left_out_stays_out() -> None:
    node = ir.node("Clip", [ir.Value(name="x"), None, ir.Value(name="high")], name="clip")
    (found,) = evaluate(node, [np.array([1.0, 9.0]), None, np.array(5.0)], 18)
    assert found is not None
    assert found.tolist() == [1.0, 5.0]


@pytest.mark.parametrize(
    ("kind", "inputs"), [("Reshape", [[1, 2, 3], [2, 2]]), ("MatMul", [[[1.0]], [[1.0], [2.0]]])]
)
def test_what_cannot_be_computed_is_not_known(kind: str, inputs: list[Any]) -> None:
    assert evaluate(make_node(kind, 2), [np.array(i) for i in inputs], 18) == [None]


def test_a_division_by_zero_does_not_warn() -> None:
    (found,) = evaluate(make_node("Div", 2), [np.array([1.0, 0.0]), np.array([0.0, 0.0])], 18)
    assert found is not None
    assert np.isinf(found[0])
    assert np.isnan(found[1])


STORED = [
    np.array(3.5, np.float32),
    np.zeros((0, 2), np.int64),
    np.array([True, False]),
    np.array([["a", "ä"]], object),
    np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3),
    np.arange(3, dtype=ml_dtypes.int4),
]


@pytest.mark.parametrize("stored", STORED, ids=lambda stored: str(stored.dtype))
def test_a_constant_is_what_the_evaluator_says(stored: np.ndarray) -> None:
    proto = helper.make_node("Constant", [], ["o0"], value=numpy_helper.from_array(stored))
    (found,) = evaluations._run_constant(proto)
    (expected,) = evaluations._run_reference(proto, {}, 21)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tolist() == expected.tolist() == stored.tolist()


def test_no_other_node_is_taken_for_a_constant() -> None:
    value = numpy_helper.from_array(np.ones(1, np.float32))
    for kind, attributes in (
        ("ConstantOfShape", {"value": value}),
        ("Constant", {"value_int": 1}),
        ("Constant", {"value": value, "domain": "ours"}),
        ("Constant", {}),
    ):
        proto = helper.make_node(kind, [], ["o0"], **attributes)
        assert evaluations._run_constant(proto) == []


def read_computed(nodes: list[onnx.NodeProto], name: str) -> np.ndarray | None:
    graph = helper.make_graph(
        nodes,
        "weights",
        [helper.make_tensor_value_info(n, FLOAT, [2, 3]) for n in ("x", "w")],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(np.array(3, np.float32), "three")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    weights = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    return WeightValues(ir.from_proto(model).graph, weights.get).read(name)


def test_what_is_computed_from_weights_alone_is_read() -> None:
    nodes = [
        helper.make_node("Mul", ["w", "three"], ["m"]),
        helper.make_node("Transpose", ["m"], ["t"]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    expected = 3 * np.arange(6, dtype=np.float32).reshape(2, 3)
    for name, array in {"w": expected / 3, "m": expected, "t": expected.T}.items():
        np.testing.assert_array_equal(read_computed(nodes, name), array)
    assert read_computed(nodes, "y") is None  # it depends on data
    assert read_computed(nodes, "other") is None


def test_what_would_take_long_to_compute_is_not() -> None:
    chain = [helper.make_node("Neg", [f"v{i}"], [f"v{i + 1}"]) for i in range(99)]
    chain[0].input[0] = "w"
    nodes = [*chain, helper.make_node("Identity", ["v99"], ["y"])]
    assert read_computed(nodes, "v9") is not None
    assert read_computed(nodes, "v99") is None
    large = numpy_helper.from_array(np.array([1 << 13, 1 << 13]))
    nodes = [
        helper.make_node("Constant", [], ["size"], value=large),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
        helper.make_node("Add", ["zeros", "three"], ["y"]),
    ]
    assert read_computed(nodes, "y") is None


def test_the_evaluator_is_imported_where_it_is_needed_alone() -> None:
    model = ROOT / "examples" / "digits.onnx"
    script = f"import sys, splitonnx; splitonnx.inspect({str(model)!r}); print(*sys.modules)"
    assert "onnx.reference" not in run(sys.executable, "-c", script, cwd=ROOT).split()
