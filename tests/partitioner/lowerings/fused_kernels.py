"""How a lowering is held against the fused kernel that it stands for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper

from splitonnx.partitioner.differentiation.gradients import differentiate
from splitonnx.partitioner.lowerings import is_standard, lower
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
