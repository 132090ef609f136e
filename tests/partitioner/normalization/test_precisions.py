"""Models of 16 and of 64 bits train in float32 and come back in their own precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.normalization.precisions import replace_null_casts
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.remarks import Kind
from splitonnx.runtime.client.clients import Client
from splitonnx.verifications import verify
from tests.support.zoo import ZOO

FLOAT, FLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16
BFLOAT16, DOUBLE = TensorProto.BFLOAT16, TensorProto.DOUBLE

NUMPY: dict[int, np.dtype[Any]] = {
    FLOAT16: np.dtype(np.float16),
    BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    DOUBLE: np.dtype(np.float64),
}

CUTS = {
    "attention": ("residual", "contracted"),
    "batchnorm_trained": ("r1", "pool"),
    "chain": ("act0", "act2"),
    "convolutions": ("r1", "t2"),
    "embedding": ("mean", "r1"),
}


def convert(model: onnx.ModelProto, dtype: int, *, opset: int = 22) -> onnx.ModelProto:
    """Write a float32 model in another precision, as a converter does."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    changed.ir_version = 10
    changed.opset_import[0].version = opset  # convolutions take bfloat16 since 22
    graph = changed.graph
    tensors = [*graph.initializer, *(a.t for n in graph.node for a in n.attribute)]
    for tensor in tensors:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(NUMPY[dtype])
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = dtype
    onnx.checker.check_model(changed, full_check=True)
    return changed


def keep_norms(model: onnx.ModelProto) -> onnx.ModelProto:
    """Put each normalization of a 16-bit model in float32 between Casts."""
    mixed = onnx.ModelProto()
    mixed.CopyFrom(model)
    weights = {tensor.name: tensor for tensor in mixed.graph.initializer}
    nodes = []
    for node in model.graph.node:
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        if node.op_type in ("BatchNormalization", "LayerNormalization"):
            source, target = f"{node.output[0]}.in", f"{node.output[0]}.out"
            nodes.append(helper.make_node("Cast", [node.input[0]], [source], to=TensorProto.FLOAT))
            changed.input[0], changed.output[0] = source, target
            nodes.append(changed)
            nodes.append(helper.make_node("Cast", [target], [node.output[0]], to=FLOAT16))
            for name in node.input[1:]:
                array = numpy_helper.to_array(weights[name]).astype(np.float32)
                weights[name].CopyFrom(numpy_helper.from_array(array, name))
        else:
            nodes.append(changed)
    del mixed.graph.node[:]
    mixed.graph.node.extend(nodes)
    onnx.checker.check_model(mixed, full_check=True)
    return mixed


def draw(name: str, dtype: int, samples: int = 16) -> dict[str, np.ndarray]:
    """Draw data that 16 bits hold exactly, as the model's input takes it."""
    data = ZOO[name].data(samples)
    fed = np.dtype(np.float32) if dtype == BFLOAT16 else NUMPY[dtype]
    return {
        key: array.astype(NUMPY[dtype]).astype(fed) if array.dtype == np.float32 else array
        for key, array in data.items()
    }


def list_types(values: list[onnx.ValueInfoProto]) -> dict[str, int]:
    return {value.name: value.type.tensor_type.elem_type for value in values}


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", CUTS)
def test_a_16_bit_model_is_cut_trained_and_merged(name: str, dtype: int) -> None:
    model = convert(ZOO[name].build(), dtype)
    at, tail = CUTS[name]
    bundle = cut(model, at=at, tail_at=tail)
    assert verify(bundle, draw(name, dtype), steps=2, batch_size=8).largest_difference == 0.0
    states = [s for p in bundle.parties.values() for s in p.manifest.state]
    assert {s.tensor.dtype for s in states} == {"F32"}
    wires = bundle.client.manifest.phase("train").wires
    assert {w.tensor.dtype for w in wires if not w.tensor.name.startswith("labels")} <= {"F32"}
    merged = onnx.load_from_string(merge(bundle))
    assert list_types(list(merged.graph.input)) == list_types(list(model.graph.input))
    assert list_types(list(merged.graph.output)) == list_types(list(model.graph.output))
    kept = {t.name: numpy_helper.to_array(t) for t in merged.graph.initializer}
    weights = {n: a for p in bundle.parties.values() for n, a in p.weights.items()}
    for key, array in weights.items():
        assert kept[key].dtype == NUMPY[dtype]
        np.testing.assert_array_equal(kept[key], array.astype(NUMPY[dtype]))


def train(model: onnx.ModelProto, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    bundle = cut(model, at=None)
    with Client(bundle.client, None, threads=1) as client:
        client.fit(data, batch_size=8)
        return dict(client.state())


@pytest.mark.parametrize("name", ["attention", "batchnorm_trained", "embedding"])
def test_a_float16_model_trains_as_its_float32_twin(name: str) -> None:
    half = convert(ZOO[name].build(), FLOAT16, opset=18)
    twin = ZOO[name].build()
    for tensor in twin.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    data = draw(name, FLOAT16)
    wide = {k: a.astype(np.float32) if a.dtype == np.float16 else a for k, a in data.items()}
    trained, expected = train(half, data), train(twin, wide)
    assert trained.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_allclose(trained[key], array, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["attention", "batchnorm_trained"])
def test_a_mixed_model_keeps_its_mixture(name: str) -> None:
    model = keep_norms(convert(ZOO[name].build(), FLOAT16))
    at, tail = CUTS[name]
    bundle = cut(model, at=at, tail_at=tail)
    assert verify(bundle, draw(name, FLOAT16), steps=2, batch_size=8).largest_difference == 0.0
    merged = onnx.load_from_string(merge(bundle))
    before = {t.name: t.data_type for t in model.graph.initializer}
    after = {t.name: t.data_type for t in merged.graph.initializer}
    assert after.items() <= before.items()
    assert set(after.values()) >= {TensorProto.FLOAT, FLOAT16}
    assert list_types(list(merged.graph.output)) == list_types(list(model.graph.output))
    (remark,) = (r for r in check(model).remarks if r.kind is Kind.PRECISION)
    assert set(remark.names) <= {n for n, kind in before.items() if kind == FLOAT16}
    assert "trained in float32, and rounded to float16 once merged" in remark.sentence


def test_a_float32_model_has_nothing_to_remark_on() -> None:
    assert all(r.kind is not Kind.PRECISION for r in check(ZOO["chain"].build()).remarks)


def test_numbers_that_the_models_type_cannot_hold_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = cut(convert(ZOO["chain"].build(), FLOAT16), at=None)
    merge(bundle)
    assert "infinite" not in caplog.text
    name, array = next(iter(bundle.client.weights.items()))
    array = array.copy()
    array.flat[:2] = [7e4, -7e4]
    party = dataclasses.replace(bundle.client, weights={**bundle.client.weights, name: array})
    merge(dataclasses.replace(bundle, parties={"client": party}))
    assert f"'{name}': 2 numbers became infinite, because they are too large" in caplog.text
    assert "float16" in caplog.text


def test_a_merged_float16_model_predicts_as_its_parts() -> None:
    model = convert(ZOO["chain"].build(), FLOAT16)
    bundle = cut(model, at=None)
    data = {"x": draw("chain", FLOAT16)["x"]}
    with Client(bundle.client, None, threads=1) as client:
        (predicted,) = client.predict(data).values()
    assert predicted.dtype == np.float32
    (expected,) = onnxruntime.InferenceSession(merge(bundle)).run(None, data)
    assert expected.dtype == np.float16
    np.testing.assert_allclose(predicted, expected, rtol=1e-2, atol=1e-2)


def test_a_float64_model_trains_in_float32_and_stays_float64() -> None:
    model = convert(ZOO["attention"].build(), DOUBLE)
    bundle = cut(model, at="residual", tail_at="contracted")
    assert verify(bundle, draw("attention", DOUBLE), batch_size=8).largest_difference == 0.0
    merged = onnx.load_from_string(merge(bundle))
    assert list_types(list(merged.graph.output)) == {"scores_out": DOUBLE}
    (tensor,) = [t for t in merged.graph.initializer if t.name == "w1"]
    assert tensor.data_type == DOUBLE


def test_float64_arithmetic_without_weights_stays() -> None:
    model = ZOO["chain"].build()
    first = model.graph.node[0].input[0]
    model.graph.node[0].input[0] = "back"
    for node in (
        helper.make_node("Cast", ["long"], ["back"], to=TensorProto.FLOAT),
        helper.make_node("Abs", ["wide"], ["long"]),
        helper.make_node("Cast", [first], ["wide"], to=DOUBLE),
    ):
        model.graph.node.insert(0, node)
    bundle = cut(model, at="act0")
    (stage,) = [g for n, g in bundle.client.graphs.items() if n == "head.forward.onnx"]
    casts = [n for n in onnx.load_from_string(stage).graph.node if n.op_type == "Cast"]
    assert {node.attribute[0].i for node in casts} == {DOUBLE, TensorProto.FLOAT}


def test_an_input_of_8_bit_floats_is_refused() -> None:
    model = ZOO["chain"].build()
    model.graph.node[0].input[0] = "wide"
    model.graph.node.insert(
        0, helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT, name="widen")
    )
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT8E4M3FN
    model.opset_import[0].version = 19
    model.ir_version = 9
    with pytest.raises(UnsupportedModel, match=r"input 'x': it is of type FLOAT8E4M3FN"):
        cut(model, at="act0")


def test_a_float16_model_of_which_nothing_is_left_is_refused_in_a_sentence() -> None:
    half = helper.make_tensor("half", TensorProto.FLOAT16, [2], np.ones(2, np.float16))
    inputs, outputs = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, [2]) for name in ("x", "y")
    )
    nodes = [helper.make_node("Add", ["half", "half"], ["y"])]
    graph = helper.make_graph(nodes, "constant", [inputs], [outputs], [half])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    with pytest.raises(UsageError, match="no output that depends on its inputs"):
        cut(model, at=None, loss="mse")


def build_attention() -> onnx.ModelProto:
    """Build an Attention of opset 23, whose function casts to the type of its softmax."""
    return parse(
        """
        y_q = MatMul(x, wq)
        y_k = MatMul(x, wk)
        attended = Attention<q_num_heads = 2, kv_num_heads = 2>(y_q, y_k, y_q)
        y = MatMul(attended, wo)""",
        23,
    )


def build_cast_like() -> onnx.ModelProto:
    return parse(
        """
        y_q = MatMul(x, wq)
        like = CastLike(y_q, x)
        shares = Softmax(like)
        again = Cast<to = 10>(shares)
        mixed = MatMul(again, wk)
        y = MatMul(mixed, wo)""",
        19,
    )


def build_branches() -> onnx.ModelProto:
    return parse(
        """
        y_q = MatMul(x, wq)
        attended = If (on) <
            then_branch = then () => (float16[N, 5, 8] a) {
                cast = Cast<to = 10>(y_q)
                a = Softmax(cast)
            },
            else_branch = other () => (float16[N, 5, 8] b) { b = MatMul(y_q, wk) }>
        y = MatMul(attended, wo)""",
        18,
    )


def parse(nodes: str, opset: int) -> onnx.ModelProto:
    """Build a float16 model ``x [N, 5, 8] -> y`` of these nodes with three matrices of 8."""
    flag = numpy_helper.from_array(np.array(True), "on")
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": {opset}]>
        halves (float16[N, 5, 8] x) => (float16[N, 5, 8] y) {{ {nodes} }}"""
    )
    arrays = {n: random.standard_normal((8, 8)).astype(np.float16) / 3 for n in ("wq", "wk", "wo")}
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    model.graph.initializer.append(flag)
    return model


@pytest.mark.parametrize("build", [build_attention, build_cast_like, build_branches])
def test_a_merged_model_of_float16_runs_with_and_without_optimizations(
    build: Callable[[], onnx.ModelProto],
) -> None:
    model = build()
    cut_at = ["y_q", "y_k"] if build is build_attention else "y_q"
    merged = merge(cut(model, at=cut_at, loss="mse", check=False))
    x = np.random.default_rng(1).standard_normal((3, 5, 8)).astype(np.float16)
    results = ReferenceEvaluator(model).run(None, {"x": x})
    assert isinstance(results, list)
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        (found,) = onnxruntime.InferenceSession(merged, options).run(None, {"x": x})
        np.testing.assert_allclose(found, results[0], rtol=1e-2, atol=1e-2, err_msg=level)


def test_a_cast_to_another_type_stays() -> None:
    model = ir.from_proto(build_cast_like())
    model.graph[3].attributes["to"] = ir.AttrInt64("to", FLOAT)
    for value in model.graph.all_nodes():
        value.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    replace_null_casts(model.graph)
    assert [node.op_type for node in model.graph if "Cast" in node.op_type] == ["CastLike", "Cast"]
    model.graph[3].attributes["to"] = ir.AttrInt64("to", FLOAT16)
    replace_null_casts(model.graph)
    assert model.graph[3].op_type == "Identity"
    assert not model.graph[3].attributes
