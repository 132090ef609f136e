"""What is known of tensors before data come: every claim holds for whatever sizes the data have."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.errors import InternalModelError, UnsupportedModel
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.inference.dimensions import Amount, list_terms, make_atom
from splitonnx.partitioner.inference.inferences import MOST_ELEMENTS, Inference

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
N, T = make_atom("N"), make_atom("T")


class Path:
    """Nodes that lead from ``x`` (N, T, 6) onwards, and constants beside them."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        names = [given if isinstance(given, str) else self.store(given) for given in inputs]
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [out], name=out, **attributes))
        return out

    def store(self, values: Any) -> str:
        name = f"c{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.array(values), name))
        return name

    def build(self, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "path", [helper.make_tensor_value_info("x", FLOAT, ["N", "T", 6])],
            [onnx.ValueInfoProto(name=name) for name in outputs], self.stored,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)

    def infer(self) -> tuple[Inference, dict[str, ir.Value]]:
        names = [name for node in self.nodes for name in node.output]
        graph = ir.from_proto(self.build(*names)).graph
        known = Inference(18)
        for node in graph:
            known.visit(node)
        return known, map_values(graph)


def put(amount: Any, sizes: dict[str, int]) -> int:
    """Put sizes into an amount."""
    total = 0
    for atoms, factor in list_terms(amount):
        total += factor * int(np.prod([sizes[atom] for atom in atoms], initial=1))
    return total


def hold(path: Path, *outputs: str) -> tuple[Inference, dict[str, ir.Value]]:
    """Hold what is known of values against what ONNX Runtime gives for several sizes."""
    known, values = path.infer()
    session = onnxruntime.InferenceSession(path.build(*outputs).SerializeToString())
    for n, t in ((2, 4), (1, 1), (3, 7)):
        x = np.random.default_rng(0).standard_normal((n, t, 6)).astype(np.float32)
        results = dict(zip(outputs, session.run(None, {"x": x}), strict=True))
        for name, found in results.items():
            dims = known.shape(values[name])
            assert dims is not None, name
            assert [put(d, {"N": n, "T": t}) for d in dims] == list(found.shape), name
            content = known.content(values[name])
            if content is not None:
                told = [put(e, {"N": n, "T": t}) for e in content.reshape(-1)]
                assert told == found.reshape(-1).tolist(), name
    return known, values


def test_sizes_are_kept_through_shape_gather_concat_and_reshape() -> None:
    path = Path()
    shape = path.op("Shape", "x")
    batch, time = path.op("Gather", shape, [0]), path.op("Gather", shape, [1])
    target = path.op("Concat", path.op("Mul", batch, time), [2, 3], axis=0)
    view = path.op("Reshape", "x", target)
    known, values = hold(path, shape, batch, time, target, view)
    assert known.shape(values[view]) == [N * T, 2, 3]
    content = known.content(values[target])
    assert content is not None
    assert content.tolist() == [N * T, 2, 3]


@pytest.mark.parametrize(
    ("kind", "operand", "expected"),
    [("Add", 2, N + 2), ("Sub", 1, N - 1), ("Mul", 3, N * 3), ("Max", 0, N), ("Min", 0, 0)],
)
def test_arithmetic_on_sizes_is_exact(kind: str, operand: int, expected: Amount) -> None:
    path = Path()
    size = path.op("Gather", path.op("Shape", "x"), [0])
    made = path.op(kind, size, [operand])
    known, values = hold(path, made)
    content = known.content(values[made])
    assert content is not None
    assert content.tolist() == [expected]


def test_comparisons_are_told_where_they_hold_for_every_size() -> None:
    path = Path()
    size = path.op("Gather", path.op("Shape", "x"), [0])
    more = path.op("Add", size, [1])
    sure, open_ = path.op("Less", size, more), path.op("Less", size, [5])
    known, values = hold(path, sure, open_)
    content = known.constant(values[sure])
    assert content is not None
    assert content.tolist() == [True]
    assert known.content(values[open_]) is None


def test_symbols_are_moved_as_the_operator_moves_numbers() -> None:
    path = Path()
    shape = path.op("Shape", "x")
    turned = path.op("Slice", shape, [2], [-4], [0], [-1])
    square = path.op("Unsqueeze", turned, [1])
    twice = path.op("Expand", square, [3, 2])
    hold(path, turned, square, twice)


def test_the_number_of_elements_is_a_product() -> None:
    path = Path()
    size = path.op("Size", "x")
    known, values = hold(path, size)
    content = known.content(values[size])
    assert content is not None
    assert content.reshape(-1).tolist() == [N * T * 6]


def test_a_constant_is_known_whole_and_a_symbol_is_no_constant() -> None:
    path = Path()
    known_part = path.op("Gather", path.op("Shape", "x"), [2])
    open_part = path.op("Gather", path.op("Shape", "x"), [0])
    known, values = path.infer()
    content = known.constant(values[known_part])
    assert content is not None
    assert content.tolist() == [6]
    assert known.constant(values[open_part]) is None
    assert known.content(values[open_part]) is not None


def test_large_constants_and_results_are_not_computed() -> None:
    path = Path()
    large = path.store(np.zeros(MOST_ELEMENTS + 1, np.float32))
    copied = path.op("Neg", large)
    grown = path.op("Expand", [1.0], [MOST_ELEMENTS + 1])
    known, values = path.infer()
    for name in (large, copied, grown):
        assert known.content(values[name]) is None, name
        assert known.shape(values[name]) == [MOST_ELEMENTS + 1], name


def test_a_dimension_that_is_not_known_gets_a_name_of_its_own() -> None:
    path = Path()
    places = path.op("NonZero", "x")
    known, values = path.infer()
    dims = known.shape(values[places])
    assert dims is not None
    assert dims[0] == 3
    assert dims[1] not in (N, T)
    assert not isinstance(dims[1], int)


def test_what_is_known_is_noted_on_the_value_and_read_back() -> None:
    path = Path()
    flat = path.op("Flatten", "x")
    known, values = path.infer()
    values[flat].shape = None
    known.note(values[flat])
    assert values[flat].shape == ir.Shape(["N", str(T * 6)])
    again = Inference(18)
    assert again.shape(values[flat]) == [N, T * 6]
    assert known.write(T * 6) == str(T * 6)
    assert known.write(4) == 4


def test_of_a_value_without_notes_nothing_is_known() -> None:
    value = ir.Value(name="x")
    known = Inference(18)
    assert known.shape(value) is None
    assert known.content(value) is None
    assert known.content(None) is None


@pytest.mark.parametrize("raised", [IndexError, TypeError])
def test_what_fails_names_the_node_and_whose_mistake_it_is(
    raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise raised("of a rule")

    monkeypatch.setattr(Inference, "_infer", fail)
    path = Path()
    path.op("Relu", "x")
    with pytest.raises(InternalModelError, match=r"'v0' \(Relu\)"):
        path.infer()


def test_a_node_that_no_runtime_takes_is_the_models_fault() -> None:
    path = Path()
    path.op("Tile", "x", [2])
    with pytest.raises(UnsupportedModel, match=r"'v0' \(Tile\)"):
        path.infer()
