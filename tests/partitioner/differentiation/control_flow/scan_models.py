"""Small models with a Scan, and their gradients by differences in float64.

A step reads the state ``a`` and the row ``b``, both (2, 3), and the values ``w`` (3, 3), ``v``
(3, 3) and ``p`` (3) around the Scan.  It makes the next state ``n`` and the row ``y``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from splitonnx.partitioner.differentiation.gradients import differentiate
from splitonnx.partitioner.inference.shapes import infer_shapes
from splitonnx.partitioner.lowerings import lower
from splitonnx.partitioner.rewrites import rewrite
from tests.support.oracles import differentiate_numerically, to_double

Arrays = Mapping[str, np.ndarray]

_HEAD = """
<ir_version: 9, opset_import: ["" : 18]>
scans (float[N, 3] s, float[T, N, 3] x, float[3, 3] w, float[3, 3] v, float[3] p) => (float loss)
{
"""
_SCAN = """
    last, rows = Scan <num_scan_inputs = 1, {directions}
        body = step (float[N, 3] a, float[N, 3] b) => (float[N, 3] n, float[N, 3] y) {{ {step} }}
    > (s, x)
"""
LOSS = """
    total = ReduceSumSquare <keepdims = 0> (last)
    bent = Tanh (rows)
    other = ReduceSum <keepdims = 0> (bent)
    loss = Add (total, other)
"""
_BACKWARDS = "scan_input_directions = [1], scan_output_directions = [1],"
SHAPES = {"s": (2, 3), "x": (4, 2, 3), "w": (3, 3), "v": (3, 3), "p": (3,)}


def write_scan(step: str, loss: str = LOSS, *, backwards: bool = False) -> onnx.ModelProto:
    """Write a model with a Scan of ``step``, and ``loss`` behind it."""
    scan = _SCAN.format(step=step, directions=_BACKWARDS if backwards else "")
    return onnx.parser.parse_model(f"{_HEAD}{scan}{loss}}}")


_MIXED = """
<ir_version: 9, opset_import: ["" : 18]>
scans (float[2, 3] s, float[A, B, C] x, float[D, E, F] z, float[3, 3] w) => (float loss)
{
    last, rows, more = Scan <num_scan_inputs = 2, ATTRIBUTES,
        body = step (float[2, 3] a, float[2, 3] b, float[2, 3] c) =>
            (float[2, 3] n, float[2, 3] y, float[2, 3] u) {
                m = MatMul (a, w)  k = Mul (b, c)  t = Add (m, k)  n = Tanh (t)
                y = Mul (n, b)  u = Sub (n, c)
            }
    > (s, x, z)
    total = ReduceSumSquare <keepdims = 0> (last)
    bent = Tanh (rows)
    first = ReduceSum <keepdims = 0> (bent)
    curved = Sigmoid (more)
    axis = Constant <value_int = 0> ()
    ramp = CumSum (curved, axis)
    second = ReduceSum <keepdims = 0> (ramp)
    both = Add (first, second)
    loss = Add (total, both)
}
"""
BOTH_SHAPES = {"s": (2, 3), "x": (2, 4, 3), "z": (2, 3, 4), "w": (3, 3)}


def write_mixed(attributes: str) -> onnx.ModelProto:
    """Write a model with a Scan of two sequences with ``attributes``."""
    return onnx.parser.parse_model(_MIXED.replace("ATTRIBUTES", attributes))


def read(model: onnx.ModelProto, trained: Sequence[str]) -> ir.Model:
    """Read a model, and rewrite what lies around its Scans."""
    made = ir.from_proto(model)
    infer_shapes(made)
    rewrite(made, trained)
    for node in made.graph:
        if node.op_type in ("If", "Loop", "Scan"):
            node.name = node.outputs[0].name
    return made


def draw(
    length: int = 4,
    *,
    most: int = 3,
    condition: bool = True,
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> dict[str, np.ndarray]:
    """Return arrays to feed; ``most`` and ``condition`` are those of a Loop or an If."""
    random = np.random.default_rng(6)
    shapes = shapes or SHAPES | {"x": (length, 2, 3)}
    arrays = {n: random.normal(0, 0.8, shape).astype(np.float32) for n, shape in shapes.items()}
    return arrays | {"most": np.array(most), "c": np.array(condition)}


def run(model: onnx.ModelProto, feeds: Arrays) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [value.name for value in session.get_outputs()]
    used = {value.name for value in session.get_inputs()}
    found = session.run(None, {n: a for n, a in feeds.items() if n in used})
    return dict(zip(names, map(np.asarray, found), strict=True))


def hold_gradients(
    model: onnx.ModelProto,
    trained: list[str],
    *,
    length: int = 4,
    most: int = 3,
    condition: bool = True,
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """Hold gradients, as derived and in standard operators, against differences of the model.

    The model runs in float64 for the differences.  Return the derived model and what it gave.
    """
    feeds = draw(length, most=most, condition=condition, shapes=shapes)
    wide = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in feeds.items()}
    double = to_double(model)

    def measure() -> float:
        return float(run(double, wide)["loss"])

    joint = differentiate(read(model, trained), trained, "loss")
    found = run(ir.to_proto(joint), feeds)
    lowered = joint.clone()
    lower(lowered.graph)
    for results in (found, run(ir.to_proto(lowered), feeds)):
        assert {f"{name}_grad" for name in trained} | {"loss"} == set(results)
        for name in trained:
            gradient = results[f"{name}_grad"]
            assert gradient.shape == feeds[name].shape
            scale = max(1.0, float(np.abs(gradient).max()))
            for index, slope in differentiate_numerically(measure, wide[name], entries=6):
                assert abs(gradient[index] - slope) <= 1e-4 * scale, (name, index)
    return joint, found
