"""Models of every opset and IR version mean the same once they were brought to opset 18 to 21."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.verifications import verify
from tests.partitioner.normalization.opset_models import FLOAT, ROW, Arrays, Writer, adapt, run
from tests.support.node_cases import is_tensors_only, list_node_cases

NEWEST = onnx.defs.onnx_opset_version()


_STATE = onnxruntime.capi.onnxruntime_pybind11_state


RUNTIME_ERRORS = (_STATE.Fail, _STATE.InvalidArgument, _STATE.RuntimeException)


def write_network(opset: int) -> onnx.ModelProto:
    """One and the same network, as an exporter of ``opset`` writes it."""
    net = Writer(opset)
    scales = np.array([1, 1, 2, 2], np.float32)
    if opset < 9:
        net.op("Upsample", "x", out="up", scales=scales.tolist(), mode="nearest")
    elif opset < 10:
        net.op("Upsample", "x", net.constant("scales", scales), out="up", mode="nearest")
    elif opset < 11:
        net.op("Resize", "x", net.constant("scales", scales), out="up", mode="nearest")
    else:
        roi = "" if opset > 12 else net.constant("roi", np.zeros(0, np.float32))
        net.op("Resize", "x", roi, net.constant("scales", scales), out="up", mode="nearest",
               coordinate_transformation_mode="asymmetric", nearest_mode="floor")  # fmt: skip
    inputs, given = net.settings(11, "padded", pads=[0, 0, 1, 1, 0, 0, 1, 1])
    net.op("Pad", "up", *inputs, out="padded", **given)
    net.op("Conv", "padded", net.weight("w1", 4, 2, 3, 3), out="c1")
    ones = np.ones(4, np.float32)
    statistics = [net.constant("n1.scale", ones), net.weight("n1.bias", 4),
                  net.constant("n1.mean", 0 * ones), net.constant("n1.var", ones)]  # fmt: skip
    outputs = ["n1", "mean_next", "var_next", *(["m2", "v2"] if opset < 14 else [])]
    training = {"training_mode": 1} if opset >= 14 else {}
    net.op("BatchNormalization", "c1", *statistics, out=outputs, **training)
    net.op("Relu", "n1", out="r1")
    bounds = {"min": np.float32(0.0), "max": np.float32(2.0)}
    if opset < 11:
        net.op("Clip", "r1", out="clipped", **{n: float(v) for n, v in bounds.items()})
    else:
        names = [net.constant(name, np.array(value)) for name, value in bounds.items()]
        net.op("Clip", "r1", *names, out="clipped")
    net.op("MaxPool", "clipped", out="pooled", kernel_shape=[2, 2], strides=[2, 2])
    if opset < 12:
        net.op("Dropout", "pooled", out="dropped", ratio=0.25)
    else:
        net.op("Dropout", "pooled", net.constant("ratio", np.array(0.25, np.float32)),
               net.constant("on", np.array(True)), out="dropped")  # fmt: skip
    inputs, given = net.settings(10, "sliced", starts=[0, 1], ends=[5, 6], axes=[2, 3])
    net.op("Slice", "dropped", *inputs, out="sliced", **given)
    inputs, given = net.settings(13, "parts", split=[2, 2])
    net.op("Split", "sliced", *inputs, out=["left", "right"], axis=1, **given)
    net.op("Mul", "left", "right", out="product")
    inputs, given = net.settings(18, "meaned", axes=[3])
    net.op("ReduceMean", "product", *inputs, out="meaned", keepdims=1, **given)
    inputs, given = net.settings(13, "summed", axes=[3])
    net.op("ReduceSum", "meaned", *inputs, out="summed", keepdims=1, **given)
    inputs, given = net.settings(13, "squeezed", axes=[3])
    net.op("Squeeze", "summed", *inputs, out="squeezed", **given)
    inputs, given = net.settings(13, "raised", axes=[1])
    net.op("Unsqueeze", "squeezed", *inputs, out="raised", **given)
    net.op("Flatten", "raised", out="flat")
    net.op("Gemm", "flat", net.weight("w2", 3, 10), net.weight("b2", 3), out="g2", transB=1)
    net.op("Softmax", "g2", out="weighted", axis=1)
    net.op("MatMul", "weighted", net.weight("w3", 3, 3), out="scores")
    return net.finish({"x": ["N", 2, 6, 6]}, "scores", 2)


DATA: Arrays = {
    "x": np.random.default_rng(0).standard_normal((24, 2, 6, 6), np.float32),
    "labels": np.random.default_rng(1).integers(0, 3, 24),
}


@cache
def train(opset: int) -> Arrays:
    whole = cut(write_network(opset), at=None, dropout="keep")
    with Client(whole.client, None, threads=1) as client:
        client.fit(DATA, batch_size=8)
        state = client.state()
    return {name: array for name, array in state.items() if not name.startswith("splitonnx.")}


@pytest.mark.parametrize("opset", range(7, NEWEST + 1))
def test_a_network_trains_the_same_whatever_opset_it_was_written_in(opset: int) -> None:
    expected, trained = train(18), train(opset)
    assert {"w1", "w2", "w3", "b2", "n1.mean", "n1.scale"} <= expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(trained[name], array, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("opset", [7, 9, 11, 13, NEWEST])
def test_a_network_of_another_opset_is_cut_as_the_whole(opset: int) -> None:
    model = write_network(opset)
    for at, tail in (("r1", ()), ("r1", "flat")):
        bundle = cut(model, at=at, tail_at=tail, dropout="keep", client_target="portable")
        assert verify(bundle, DATA, steps=2, batch_size=8).largest_difference <= 1e-5


APART = {
    "Bernoulli", "BitCast", "BitShift", "Cast", "CastLike", "ConvInteger", "DequantizeLinear",
    "Dropout", "MaxUnpool", "Mod", "QuantizeLinear", "RandomUniformLike", "ReverseSequence", "Scan",
    "StringNormalizer",
}  # fmt: skip
"""Random, of types that ONNX Runtime cannot be fed, refused, or wrong in ONNX Runtime itself."""


RUNTIME_FAULTS = {
    "test_averagepool_2d_ceil_last_window_starts_on_pad",
    "test_averagepool_3d_dilations_large_count_include_pad_is_1_ceil_mode_is_True",
    "test_maxpool_2d_ceil_output_size_reduce_by_one",
    "test_resize_downsample_scales_cubic_align_corners",
    "test_resize_downsample_scales_linear_align_corners",
}
"""Cases that onnxruntime 1.19.2 computes otherwise than the onnx package, whatever the opset."""


@pytest.mark.sweep
def test_all_node_cases_mean_the_same_when_they_were_adapted() -> None:
    wrong, checked = [], 0
    operators = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
    for operator in sorted(operators - APART):
        for case in list_node_cases(operator):
            dtypes = {array.dtype.name for array in map(np.asarray, case.inputs.values())}
            if case.name in RUNTIME_FAULTS or not is_tensors_only(case) or "bfloat16" in dtypes:
                continue
            try:
                onnx.checker.check_model(case.model)
            except onnx.checker.ValidationError:
                continue  # a value of no rank, which ONNX allows and its checker does not
            try:
                found = run(adapt(case.model), dict(case.inputs))
            except (UnsupportedModel, _STATE.NotImplemented):
                continue  # no such kernel
            except RUNTIME_ERRORS:
                continue
            checked += 1
            tolerance = 2e-3 if "float16" in dtypes else 1e-3
            for array, expected in zip(found, case.outputs.values(), strict=True):
                if not np.allclose(array, expected, tolerance, tolerance, equal_nan=True):
                    wrong.append(case.name)
    assert not wrong
    assert checked > 900


def test_functions_of_another_opset_are_inlined() -> None:
    body = [helper.make_node("Squeeze", ["a"], ["s"], axes=[0])]
    function = helper.make_function(
        "local", "Strip", ["a"], ["s"], body, [helper.make_opsetid("", 11)]
    )
    graph = helper.make_graph(
        [helper.make_node("Strip", ["x"], ["y"], domain="local")],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", FLOAT, [3])],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)
    (found,) = run(adapt(model), {"x": ROW[None]})
    np.testing.assert_array_equal(found, ROW)


def _single(kind: str, opset: int, dtype: int, **attributes: Any) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node(kind, ["x"], ["y"], name="only", **attributes)],
        "g",
        [helper.make_tensor_value_info("x", dtype, [2])],
        [helper.make_tensor_value_info("y", dtype, [2])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            lambda: _single("BitCast", 26, FLOAT, to=FLOAT),
            r"node 'only' \(BitCast of opset 26\): no operator up to opset 21 has its meaning",
        ),
        (
            lambda: _single("Celu", 28, TensorProto.DOUBLE),
            r"node 'only' \(Celu of opset 28\): .* takes no DOUBLE",
        ),
    ],
)
def test_what_cannot_come_down_is_named(model: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(UnsupportedModel, match=sentence):
        adapt(model())


def test_names_that_exist_survive() -> None:
    names = {value for node in write_network(9).graph.node for value in node.output}
    adapted = adapt(write_network(9))
    assert names - {"m2", "v2"} <= {value for node in adapted.graph.node for value in node.output}
