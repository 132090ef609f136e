"""Poolings in a process of their own, which MaxPoolGrad ended: ``TASK RANK DYNAMIC``.

The task ``sizes`` holds a MaxPool whose input has the unknown dimensions DYNAMIC to differences,
and ``body`` one in a Loop.  ``empty`` gives a MaxPool windows without a number above the lowest
float, such as those that a mask of -inf covers, and compares with the maxima that numpy finds.
"""

from __future__ import annotations

import sys

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.differentiation.gradients import differentiate
from splitonnx.partitioner.inference.shapes import infer_shapes
from splitonnx.partitioner.lowerings import lower
from splitonnx.partitioner.rewrites import rewrite
from tests.partitioner.differentiation.control_flow.loop_models import write_loop
from tests.partitioner.differentiation.control_flow.scan_models import hold_gradients
from tests.support.images import Case, attach, build, hold, run

IMAGES = {1: (9,), 2: (7, 8), 3: (4, 4, 5)}
LOWEST = np.finfo(np.float32).min


def hold_sizes(rank: int, dynamic: list[int]) -> None:
    """Hold padded, dilated pools of three samples of five channels."""
    attributes = {
        "kernel_shape": [2] * rank,
        "strides": [2, 1, 1][:rank],
        "dilations": [1, 2, 1][:rank],
        "pads": [1] * rank + [0] * rank,
    }
    case = Case(kind="MaxPool", x=(3, 5, *IMAGES[rank]), attributes=attributes, dynamic=dynamic)
    hold(case, oracle="kernel")


def hold_body(axis: int) -> None:
    """Hold a pool in a Loop over channels of unknown number (0), or samples (1)."""
    step = (
        f"b = Gather (x, i)  axis = Constant <value_ints = [{axis}]> ()  r = Unsqueeze (a, axis)  "
        "q = MaxPool <kernel_shape = [2], pads = [0, 1]> (r)  f = Squeeze (q, axis)  "
        "m = MatMul (f, w)  k = Gemm (b, v)  t = Add (m, k)  n = Tanh (t)  y = Mul (n, p)"
    )
    hold_gradients(write_loop(step), ["s", "x", "w", "v", "p"])


def compare_empty(rank: int, dynamic: list[int]) -> None:
    """Compare pools of 4 windows a channel, of which whole channels and one more have no number."""
    x = np.random.default_rng(2).standard_normal((2, 3, 4, *[2] * rank)).astype(np.float32)
    x[0, 0], x[1, 1], x[1, 2] = -np.inf, np.nan, LOWEST  # (N, C, windows, elements...)
    x[0, 1, 2] = -np.inf
    image = (8, *[2] * (rank - 1))
    kernel = [2] * rank
    case = Case(
        kind="MaxPool",
        x=(2, 3, *image),
        attributes={"kernel_shape": kernel, "strides": kernel},
        dynamic=dynamic,
    )
    windows = x.reshape(2, 3, 4, -1)
    found = (windows > LOWEST).any(-1)
    expected = np.where(found, windows.max(-1), LOWEST)
    slopes = np.random.default_rng(6).uniform(0.5, 1.5, expected.shape).astype(np.float32)
    gradient = np.zeros_like(windows)
    places = windows.argmax(-1)[..., None]
    np.put_along_axis(gradient, places, np.where(found, slopes, 0)[..., None], -1)
    shape = (2, 3, 4, *[1] * (rank - 1))
    model = ir.from_proto(build(case))
    infer_shapes(model)
    rewrite(model, ["x"])
    joint = differentiate(attach(model), ["x"], "loss")
    lower(joint.graph, defective=True)
    lowered = joint.clone()
    lower(lowered.graph)
    for form in (joint, lowered):
        made = run(form, {"x": x.reshape(2, 3, *image), "r": slopes.reshape(shape)})
        np.testing.assert_array_equal(made["y"], expected.reshape(shape))
        np.testing.assert_array_equal(made["x_grad"], gradient.reshape(2, 3, *image))


def main() -> None:
    task, rank, dynamic = sys.argv[1], int(sys.argv[2]), list(map(int, sys.argv[3:]))
    if task == "sizes":
        hold_sizes(rank, dynamic)
    elif task == "body":
        hold_body(rank)
    else:
        compare_empty(rank, dynamic)
