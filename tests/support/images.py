"""How rewrites of operators on images are tested where the node cases do not reach.

Each rewritten operator is held against the one that it stands for, as onnx.reference evaluates it
in float64, and its gradients against finite differences of that: with a dynamic batch, and a
dynamic image size where the rewrite takes one, by the fused kernels and lowered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

from splitonnx.partitioner.differentiation.gradients import differentiate
from splitonnx.partitioner.lowerings import lower
from splitonnx.partitioner.normalization.explicit_padding import make_paddings_explicit
from splitonnx.partitioner.rewrites import rewrite
from tests.support.oracles import differentiate_numerically, make_evaluator, to_double

Arrays = Mapping[str, np.ndarray]
FLOAT = TensorProto.FLOAT


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operator on ``x`` and further inputs; ``trained`` names those to differentiate to.

    ``dynamic`` are the dimensions of ``x`` that the model does not know.
    """

    kind: str
    x: tuple[int, ...]
    others: Mapping[str, np.ndarray] = field(default_factory=dict)
    trained: Sequence[str] = ("x",)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    dynamic: Sequence[int] = (0,)
    opset: int = 21


def build(case: Case) -> onnx.ModelProto:
    """Make a model of the operator alone, whose other inputs are constants if not trained."""
    names = ["x", *case.others]
    node = helper.make_node(
        case.kind,
        ["" if name.startswith("none") else name for name in names],
        ["y", *(f"y{i}" for i in range(1, case.outputs))],
        name="node",
        **case.attributes,
    )
    dims: list[int | str] = list(case.x)
    for axis in case.dynamic:
        dims[axis] = f"d{axis}"
    inputs = [helper.make_tensor_value_info("x", FLOAT, dims)]
    constants = []
    for name, array in case.others.items():
        if name in case.trained:
            inputs.append(helper.make_tensor_value_info(name, FLOAT, array.shape))
        elif not name.startswith("none"):
            constants.append(numpy_helper.from_array(array, name))
    outputs = [helper.make_empty_tensor_value_info("y")]
    graph = helper.make_graph([node], "case", inputs, outputs, constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=10
    )
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def draw(case: Case) -> dict[str, np.ndarray]:
    """Draw ``x``, without ties, and give what is trained beside it."""
    random = np.random.default_rng(4)
    size = int(np.prod(case.x))
    values = (random.permutation(size) + random.uniform(0.1, 0.4, size)) * 4 / size - 2
    feeds = {"x": values.reshape(case.x).astype(np.float32)}
    return feeds | {n: a for n, a in case.others.items() if n in case.trained and n != "x"}


def attach(model: ir.Model) -> ir.Model:
    """Add the loss: the sum of the output times a tensor ``r``."""
    y = model.graph.outputs[0]
    shape = None if y.shape is None else ir.Shape(y.shape.dims)
    r = ir.Value(name="r", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    model.graph.inputs.append(r)
    product = ir.node("Mul", [y, r], name="product")
    product.outputs[0].name = "product_value"
    total = ir.node("ReduceSum", [product.outputs[0]], {"keepdims": 0}, name="total")
    total.outputs[0].name = "loss"
    total.outputs[0].type, total.outputs[0].shape = r.type, ir.Shape([])
    model.graph.extend([product, total])
    model.graph.outputs.append(total.outputs[0])
    return model


def run(model: ir.Model, feeds: Arrays) -> dict[str, np.ndarray]:
    used = {value.name for value in model.graph.inputs}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    results = session.run(None, {n: a for n, a in feeds.items() if n in used})
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, results, strict=True))


def hold(case: Case, *, oracle: str = "both") -> set[str]:
    """Check values and gradients of the rewritten operator; name the operators it became.

    The oracle is onnx.reference, or where that is wrong ONNX Runtime's kernel, whose differences
    are wide, as they are float32: for operators linear in each input.  ``both`` holds the two to
    the same values.
    """
    original, feeds = build(case), draw(case)
    evaluator = None if oracle == "kernel" else make_evaluator(to_double(original))
    wide = {name: array.astype(np.float64) for name, array in feeds.items()}

    def evaluate() -> np.ndarray:
        if evaluator is None:
            narrow = {name: array.astype(np.float32) for name, array in wide.items()}
            return run(ir.from_proto(original), narrow)["y"].astype(np.float64)
        results = evaluator.run(None, wide)
        assert isinstance(results, list)
        return np.asarray(results[0])

    settled = ir.from_proto(original)
    make_paddings_explicit(settled.graph)
    expected = evaluate()
    if oracle == "both":
        kernels = run(settled, feeds)["y"]
        np.testing.assert_allclose(kernels, expected, rtol=1e-4, atol=1e-4)
    factors = np.random.default_rng(6).uniform(0.5, 1.5, expected.shape).astype(np.float32)

    model = settled.clone()
    ShapeInferencePass(check_type=True, strict_mode=False, data_prop=True)(model)
    rewrite(model, case.trained)
    used = {node.op_type for node in model.graph}
    joint = differentiate(attach(model), list(case.trained), "loss")
    lower(joint.graph, defective=True)
    lowered = joint.clone()
    lower(lowered.graph)
    results = [run(form, {**feeds, "r": factors}) for form in (joint, lowered)]
    for found in results:
        assert found["y"].shape == expected.shape
        np.testing.assert_allclose(found["y"], expected, rtol=1e-4, atol=1e-4)
    for name in case.trained:
        slopes = list(
            differentiate_numerically(
                lambda: float((evaluate() * factors).sum()),
                wide[name],
                entries=5,
                step=0.01 if oracle == "kernel" else 1e-5,
            )
        )
        for found in results:
            gradient = found[f"{name}_grad"]
            assert gradient.shape == feeds[name].shape
            scale = max(1.0, float(np.abs(gradient).max()))
            for index, slope in slopes:
                assert abs(gradient[index] - slope) <= 1e-3 * scale, (name, index)
    return used


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def whole(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)
