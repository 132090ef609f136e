"""Each lowering against the fused kernel that it stands for, over the operator's attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.differentiation.gradients import differentiate
from splitonnx.partitioner.lowerings import LOWERINGS, is_standard, lower
from tests.support.zoo import FLOAT, INT64, Net

Arrays = Mapping[str, np.ndarray]
SHAPE = (3, 4, 7, 6)


def compare(net: Net, output: str, shape: tuple[int, ...], *, static: bool = False) -> set[str]:
    """Differentiate mean(w * output**3), lower it, compare all outputs; name what was lowered.

    The cube, as a square would leave normalizations with gradients of nothing but rounding.

    ``x`` is the input, a parameter too, so that its gradient is among the outputs.
    """
    squared = net.op("Mul", output, output, out="squared")
    cubed = net.op("Mul", squared, output, out="cubed")
    net.op("ReduceMean", net.op("Mul", cubed, "weight", out="product"), out="loss", keepdims=0)
    dims: list[int | str] = list(shape) if static else ["N", *shape[1:]]
    parameters = ["x", "weight", *(tensor.name for tensor in net.weights if _is_weight(tensor))]
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in net.weights}
    kept = [tensor for tensor in net.weights if not _is_weight(tensor)]
    inputs = [helper.make_tensor_value_info("x", FLOAT, dims)]
    inputs += [
        helper.make_tensor_value_info(name, FLOAT, values[name].shape)
        for name in parameters
        if name in values
    ]
    inputs.append(helper.make_tensor_value_info("weight", FLOAT, [1]))
    inputs.append(helper.make_tensor_value_info("labels", INT64, dims[:1] + dims[2:]))
    graph = helper.make_graph(
        net.nodes, "case", inputs, [helper.make_tensor_value_info("loss", FLOAT, [])], kept
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", net.opset)], ir_version=9
    )
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    random = np.random.default_rng(3)
    feeds: dict[str, np.ndarray] = {
        "x": random.standard_normal(shape).astype(np.float32),
        "weight": np.array([1.5], np.float32),
        "labels": random.integers(0, shape[1], (shape[0], *shape[2:])),
        **{name: values[name] for name in parameters if name in values},
    }
    joint = differentiate(ir.from_proto(model), parameters, "loss")
    fused = run(joint, feeds)
    before = {node.op_type for node in joint.graph if not is_standard(node, net.opset)}
    lower(joint.graph)
    assert all(is_standard(node, net.opset) for node in joint.graph)
    lowered = run(joint, feeds)
    assert lowered.keys() == fused.keys()
    for name, expected in fused.items():
        scale = float(np.abs(expected).max()) or 1.0
        assert lowered[name].shape == expected.shape, name
        assert float(np.abs(lowered[name] - expected).max()) <= 2e-5 * scale, name
    return before


def _is_weight(tensor: TensorProto) -> bool:
    statistic = tensor.name.endswith((".mean", ".var"))
    return tensor.data_type == FLOAT and len(tensor.dims) > 0 and not statistic


def run(model: ir.Model, feeds: Arrays) -> dict[str, np.ndarray]:
    used = {value.name for value in model.graph.inputs}
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    results = session.run(None, {name: array for name, array in feeds.items() if name in used})
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, results, strict=True))


@pytest.mark.parametrize(
    ("weight", "attributes"),
    [
        ((5, 4, 3, 3), {}),
        ((5, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
        ((5, 4, 3, 3), {"pads": [2, 0, 1, 2]}),
        ((5, 4, 3, 3), {"strides": [2, 2]}),
        ((5, 4, 3, 3), {"strides": [2, 3], "pads": [1, 1, 1, 1]}),
        ((5, 4, 2, 2), {"strides": [3, 3]}),
        ((5, 4, 2, 2), {"dilations": [2, 3]}),
        ((5, 4, 3, 2), {"dilations": [2, 1], "strides": [2, 1], "pads": [1, 0, 2, 1]}),
        ((6, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
        ((6, 2, 3, 3), {"group": 2, "strides": [2, 2]}),
        ((4, 1, 3, 3), {"group": 4, "pads": [1, 1, 1, 1]}),
        ((8, 1, 3, 3), {"group": 4, "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ((5, 4, 1, 1), {}),
        ((5, 4, 1, 1), {"strides": [2, 2]}),
        ((5, 4, 1, 1), {"pads": [1, 1, 1, 1]}),
    ],
)
def test_convolution(weight: tuple[int, ...], attributes: dict[str, object]) -> None:
    net = Net()
    net.op("Conv", "x", net.weight("w", *weight), net.weight("b", weight[0]), out="y", **attributes)
    assert compare(net, "y", SHAPE) >= {"ConvGrad"}


@pytest.mark.parametrize("shape", [(3, 4, 9), (2, 3, 4, 5, 4)])
def test_convolution_in_one_and_three_dimensions(shape: tuple[int, ...]) -> None:
    rank = len(shape) - 2
    for strides in (1, 2):
        net = Net()
        weight = net.weight("w", 2, shape[1], *[3] * rank)
        net.op("Conv", "x", weight, out="y", strides=[strides] * rank, pads=[1] * (2 * rank))
        compare(net, "y", shape)


def test_convolution_of_images_of_any_size() -> None:
    net = Net()
    net.op("Conv", "x", net.weight("w", 5, 4, 3, 3), out="y", strides=[2, 2], pads=[1, 1, 1, 1])
    squared = net.op("Mul", "y", "y", out="squared")
    net.op("ReduceMean", squared, out="loss", keepdims=0)
    weight = onnx.numpy_helper.to_array(net.weights[0])
    graph = helper.make_graph(
        net.nodes,
        "case",
        [
            helper.make_tensor_value_info("x", FLOAT, ["N", 4, "H", "W"]),
            helper.make_tensor_value_info("w", FLOAT, weight.shape),
        ],
        [helper.make_tensor_value_info("loss", FLOAT, [])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    joint = differentiate(
        ir.from_proto(onnx.shape_inference.infer_shapes(model)), ["x", "w"], "loss"
    )
    x = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    fused = run(joint, {"x": x, "w": weight})
    lower(joint.graph)
    for name, lowered in run(joint, {"x": x, "w": weight}).items():
        np.testing.assert_allclose(lowered, fused[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 3], "strides": [1, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1},
        {"kernel_shape": [2, 2], "dilations": [2, 2], "strides": [1, 1]},
    ],
)
def test_max_pool(attributes: dict[str, object]) -> None:
    net = Net()
    net.op("MaxPool", "x", out="y", **attributes)
    assert compare(net, "y", SHAPE) >= {"MaxPoolGrad"}


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 2], "strides": [1, 2]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1},
        {"kernel_shape": [2, 2], "strides": [1, 1], "pads": [0, 1, 1, 0]},
    ],
)
def test_average_pool(attributes: dict[str, object]) -> None:
    net = Net()
    net.op("AveragePool", "x", out="y", **attributes)
    assert compare(net, "y", SHAPE, static=True) >= {"AveragePoolGrad"}


@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1},
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    ],
)
def test_average_pools_gradient_is_the_adjoint_of_the_pool(attributes: dict[str, object]) -> None:
    """<pool(x), y> = <x, pool_grad(y)>: the pool is linear, so this holds its gradient to it."""
    random = np.random.default_rng(0)
    net = Net()
    net.op("AveragePool", "x", out="y", **attributes)
    model = net.finish({"x": (FLOAT, ["N", *SHAPE[1:]])}, "y", "C", "H", "W")
    x = random.standard_normal(SHAPE).astype(np.float32)
    (pooled,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    dy = random.standard_normal(pooled.shape).astype(np.float32)
    source = ir.Value(
        name="dy", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", *dy.shape[1:]])
    )
    node = ir.node("AveragePoolGrad", [source], attributes, name="grad")  # type: ignore[arg-type]
    node.outputs[0].name, node.outputs[0].type = "dx", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(["N", *SHAPE[1:]])
    graph = ir.Graph([source], node.outputs, nodes=[node], opset_imports={"": 18}, name="grad")
    lower(graph)
    dx = run(ir.Model(graph, ir_version=9), {"dy": dy})["dx"]
    np.testing.assert_allclose(np.vdot(pooled, dy), np.vdot(x, dx), rtol=1e-4)


@pytest.mark.parametrize("kind", ["Relu", "Sigmoid", "Tanh", "Gelu", "LeakyRelu", "Sin", "Erf"])
def test_activations(kind: str) -> None:
    net = Net(opset=20 if kind == "Gelu" else 18)
    net.op(kind, "x", out="y")
    compare(net, "y", SHAPE)


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [-1, 1, 2])
def test_softmax(kind: str, axis: int) -> None:
    net = Net()
    net.op(kind, "x", out="y", axis=axis)
    assert compare(net, "y", SHAPE) >= {f"{kind}Grad_13"}


@pytest.mark.parametrize("shape", [(5, 3), (3, 4, 6), SHAPE])
def test_batch_normalization(shape: tuple[int, ...]) -> None:
    net = Net()
    net.batchnorm("x", shape[1], out="y", training=True)
    found = compare(net, "y", shape)
    assert found >= {"BatchNormInternal", "BatchNormalizationGrad"}


@pytest.mark.parametrize("axis", [-1, 1, 2])
def test_layer_normalization(axis: int) -> None:
    net = Net()
    shape = SHAPE[axis:]
    weights = [net.constant(n, np.full(shape, v, np.float32)) for n, v in (("s", 1.2), ("b", 0.3))]
    net.nodes.append(
        helper.make_node("LayerNormalization", ["x", *weights], ["y", "mean", "inv"], axis=axis)
    )
    assert compare(net, "y", SHAPE) >= {"LayerNormalizationGrad"}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [None, 2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5)])
def test_cross_entropy(
    reduction: str, ignored: int | None, weighted: bool, shape: tuple[int, ...]
) -> None:
    net = Net()
    inputs = ["x", "labels"]
    if weighted:
        values = helper.make_tensor("v", FLOAT, [4], [0.5, 1.0, 2.0, 3.0])
        net.nodes.append(helper.make_node("Constant", [], ["classes"], value=values))
        inputs.append("classes")
    attributes: dict[str, Any] = {"reduction": reduction}
    if ignored is not None:
        attributes["ignore_index"] = ignored
    net.nodes.append(
        helper.make_node("SoftmaxCrossEntropyLoss", inputs, ["y", "log_prob"], **attributes)
    )
    found = compare(net, "y", shape)
    assert found >= {"SoftmaxCrossEntropyLoss", "SoftmaxCrossEntropyLossGrad"}


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("indices", [[2, 0, 2, -1], [[1, 1], [0, 2]], 1])
def test_gather(axis: int, indices: object) -> None:
    net = Net()
    net.op("Gather", "x", net.constant("i", np.array(indices, np.int64)), out="y", axis=axis)
    assert compare(net, "y", (3, 4, 5)) >= {"GatherGrad"}


def test_gather_elements() -> None:
    net = Net()
    places = net.constant("i", np.random.default_rng(0).integers(0, 4, (3, 2, 5)))
    net.op("GatherElements", "x", places, out="y", axis=1)
    assert "GatherElementsGrad" in compare(net, "y", (3, 4, 5))


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [([1], [3], [1], [1]), ([0, -3], [9, -1], [2, 1], [2, 1]), ([-1], [-9], [1], [-2])],
)
def test_slice(starts: list[int], ends: list[int], axes: list[int], steps: list[int]) -> None:
    net = Net()
    settings = [
        net.constant(name, np.array(values, np.int64))
        for name, values in (("s", starts), ("e", ends), ("a", axes), ("t", steps))
    ]
    net.op("Slice", "x", *settings, out="y")
    assert compare(net, "y", SHAPE) >= {"SliceGrad"}


def test_split_and_concat() -> None:
    net = Net()
    sizes = net.constant("sizes", np.array([1, 3], np.int64))
    net.nodes.append(helper.make_node("Split", ["x", sizes], ["a", "b"], axis=1))
    net.op("Concat", "b", "x", "a", out="y", axis=1)
    assert compare(net, "y", SHAPE) >= {"ConcatTraining"}


@pytest.mark.parametrize("shape", [(7, 6), (4, 1, 1), (1, 4, 7, 6), (1,)])
@pytest.mark.parametrize("kind", ["Add", "Mul", "Div", "Sub", "Max"])
def test_broadcasting(kind: str, shape: tuple[int, ...]) -> None:
    net = Net()
    positive = net.constant("w", np.abs(np.random.default_rng(1).normal(2, 0.2, shape)).astype("f"))
    base = net.op("Exp", "x", out="base")
    net.op(kind, base, positive, out="y")
    compare(net, "y", SHAPE)


def test_matrix_products_with_transposes() -> None:
    net = Net()
    turned = net.op("Transpose", "x", out="turned", perm=[0, 1, 3, 2])
    product = net.op("MatMul", turned, "x", out="product_xx")
    net.op("MatMul", product, net.weight("w", 6, 5), out="y")
    assert "FusedMatMul" in compare(net, "y", SHAPE)


def test_an_operator_without_a_lowering_is_named() -> None:
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    node = ir.node("SomethingGrad", [value], domain="com.microsoft", name="odd")
    node.outputs[0].name = "y"
    graph = ir.Graph(
        [value], node.outputs, nodes=[node], opset_imports={"": 18, "com.microsoft": 1}
    )
    with pytest.raises(UnsupportedModel, match=r"'odd' \(SomethingGrad\)"):
        lower(graph)


def test_the_table_is_in_order() -> None:
    assert list(LOWERINGS) == sorted(LOWERINGS)
