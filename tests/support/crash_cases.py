"""Data that end the process in kernels: ``python -m tests.support.crash_cases TARGET``.

Each case is a model with data that its declared shapes allow, but its operators do not.  The module
runs them in its process, which tests start as a child, and prints the error's name for each task.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from splitonnx.errors import SplitonnxError
from splitonnx.messages import TaskKey
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from tests.support.address_cases import KERNELS
from tests.support.zoo import FLOAT, INT64, Arrays, Net


@dataclass(frozen=True, kw_only=True)
class Case:
    """``wires`` go to a server whose part begins ``at`` these tensors."""

    build: Callable[[], onnx.ModelProto]
    at: tuple[str, ...]
    good: Mapping[str, np.ndarray]
    bad: Mapping[str, np.ndarray]
    loss: str = "cross-entropy"
    end: str = "StageFailed"


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def build_gather() -> onnx.ModelProto:
    """GatherND with batch_dims: rows of data and of indices run in parallel."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w1", 4, 6), out="h")
    value = net.op("GatherND", value, "places", out="picked", batch_dims=1)
    value = net.op("Unsqueeze", value, net.constant("axis", np.array([1])), out="column")
    output = net.op("MatMul", value, net.weight("w2", 1, 4), out="scores")
    return net.finish({"x": (FLOAT, ["N", 4]), "places": (INT64, ["M", 1])}, output, 4)


def build_selected_gather() -> onnx.ModelProto:
    """GatherND with batch_dims, whose number of rows of indices no declaration ties to the data."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w1", 4, 6), out="h")
    kept = net.op("Compress", "picks", "kept", out="some", axis=0)
    value = net.op("GatherND", value, kept, out="picked", batch_dims=1)
    value = net.op("ReduceMean", value, net.constant("rows", np.array([0])), out="mean")
    value = net.op("Unsqueeze", value, net.constant("axis", np.array([1])), out="column")
    output = net.op("MatMul", value, net.weight("w2", 1, 4), out="scores")
    inputs: dict[str, tuple[int, list[int | str]]] = {
        "x": (FLOAT, ["N", 4]), "picks": (INT64, ["M", 1]), "kept": (TensorProto.BOOL, ["M"])
    }  # fmt: skip
    return net.finish(inputs, output, 4)


def build_division() -> onnx.ModelProto:
    """Integers that are divided by data."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w1", 4, 6), out="h")
    share = net.op("Div", net.constant("whole", np.array([12])), "count", out="share")
    rest = net.op("Mod", net.constant("more", np.array([13])), "count", out="rest")
    total = net.op("Add", share, rest, out="both")
    scale = net.op("Cast", total, out="scale", to=TensorProto.FLOAT)
    value = net.op("Mul", value, scale, out="scaled")
    output = net.op("MatMul", value, net.weight("w2", 6, 4), out="scores")
    return net.finish({"x": (FLOAT, ["N", 4]), "count": (INT64, ["N", 1])}, output, 4)


def build_quotient(operator: str, kind: int) -> onnx.ModelProto:
    """Integers of data that are divided by data."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w1", 4, 6), out="h")
    share = net.op(operator, "whole", "count", out="share")
    scale = net.op("Cast", share, out="scale", to=TensorProto.FLOAT)
    value = net.op("Mul", value, scale, out="scaled")
    output = net.op("MatMul", value, net.weight("w2", 6, 4), out="scores")
    integer: tuple[int, list[int | str]] = (kind, ["N", 1])
    return net.finish({"x": (FLOAT, ["N", 4]), "whole": integer, "count": integer}, output, 4)


def build_triangle() -> onnx.ModelProto:
    """A triangle whose diagonal is data."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w1", 4, 6), out="h")
    value = net.op("Trilu", value, "count", out="triangle")
    output = net.op("MatMul", value, net.weight("w2", 6, 4), out="scores")
    return net.finish({"x": (FLOAT, ["N", 4]), "count": (INT64, [])}, output, 4)


def build_frames(operator: str = "Conv") -> onnx.ModelProto:
    """What is computed of all frames but the last one; a sequence of one has none."""
    net = Net()
    value = net.op("Mul", "x", net.weight("scale", 1), out="h")
    names = [net.constant(n, np.array([v])) for n, v in (("s", 0), ("e", -1), ("a", 1))]
    value = net.op("Slice", value, *names, out="earlier")
    shape = net.constant("frames", np.array([-1, 2, 5, 5]))
    value = net.op("Reshape", value, shape, out="images")
    if operator == "Conv":
        value = net.op("Conv", value, net.weight("w1", 3, 2, 3, 3), out="filtered")
    else:
        value = net.op(
            "Einsum", value, net.weight("w1", 2, 3), out="mixed", equation="nchw,cd->ndhw"
        )
    value = net.op("ReduceMean", value, net.constant("space", np.array([2, 3])), out="pooled",
                   keepdims=0)  # fmt: skip
    value = net.op("ReduceSum", value, net.constant("rows", np.array([0])), out="total", keepdims=1)
    output = net.op("MatMul", value, net.weight("w2", 3, 4), out="scores")
    return net.finish({"x": (FLOAT, ["N", "T", 2, 5, 5])}, output, 4)


def build_windows(operator: str, kernel: tuple[int, int], rounds_up: int) -> onnx.ModelProto:
    """A pooling behind a convolution, for whose optimized kernel an image may be too small."""
    net, pads = Net(), [1, 1, 1, 1]
    value = net.op("Conv", "x", net.weight("w1", 16, 16, 3, 3), out="h", pads=pads)
    value = net.op("Conv", value, net.weight("w2", 16, 16, 3, 3), out="filtered", pads=pads)
    value = net.op(operator, value, out="pooled", kernel_shape=kernel, strides=[2, 2],
                   ceil_mode=rounds_up)  # fmt: skip
    space = net.constant("space", np.array([2, 3]))
    value = net.op("ReduceSum", value, space, out="total", keepdims=0)
    output = net.op("MatMul", value, net.weight("w3", 16, 4), out="scores")
    return net.finish({"x": (FLOAT, ["N", 16, "H", "W"])}, output, 4)


def build_loop_of_frames() -> onnx.ModelProto:
    """A Loop that filters as many of the frames as data say, which may be none."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18]>
        frames (float[N, 2, 5, 5] x, int64[1] some) => (float[1, 4] scores)
        {
            h = Mul (x, scale)
            from = Constant <value_ints = [0]> ()  space = Constant <value_ints = [2, 3]> ()
            first = Constant <value = float[1, 3] {0.0, 0.0, 0.0}> ()
            shape = Shape <start = 0, end = 1> (x)  times = Squeeze (shape)
            last = Loop <body = step (int64 i, bool c, float[1, 3] a) => (bool d, float[1, 3] n) {
                d = Identity (c)  images = Slice (h, from, some, from)
                filtered = Conv (images, w1)  f = ReduceMean <keepdims = 0> (filtered, space)
                total = ReduceSum (f, from)  k = Add (a, total)  n = Tanh (k)
            }> (times, , first)
            scores = MatMul (last, w2)
        }
    """)
    random = np.random.default_rng(0)
    for name, shape in (("scale", (1, 2, 1, 1)), ("w1", (3, 2, 3, 3)), ("w2", (3, 4))):
        weights = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weights, name))
    return model


def build_language_model(ignore_index: int | None = None) -> onnx.ModelProto:
    """A model that ends in the cross-entropy of each position with the next token."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w1", 4, 6), out="h")
    value = net.op("MatMul", net.op("Tanh", value, out="t"), net.weight("w2", 6, 5), out="scores")
    names = [net.constant(n, np.array([v])) for n, v in (("s", 0), ("e", -1), ("a", 1), ("one", 1))]
    value = net.op("Slice", value, names[0], names[1], names[2], out="earlier")
    last = net.constant("last", np.array([2**31 - 1]))
    targets = net.op("Slice", "tokens", names[3], last, names[2], out="later")
    flat = net.op("Reshape", value, net.constant("flat", np.array([-1, 5])), out="rows")
    targets = net.op("Reshape", targets, net.constant("open", np.array([-1])), out="targets")
    ignored = {} if ignore_index is None else {"ignore_index": ignore_index}
    net.op("SoftmaxCrossEntropyLoss", flat, targets, out="objective", **ignored)
    graph = helper.make_graph(
        net.nodes,
        "language",
        [
            helper.make_tensor_value_info("x", FLOAT, ["N", "T", 4]),
            helper.make_tensor_value_info("tokens", INT64, ["N", "T"]),
        ],
        [helper.make_tensor_value_info("objective", TensorProto.FLOAT, [])],
        net.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def _language(bad: Arrays, ignore_index: int | None = None) -> Case:
    return Case(
        build=lambda: build_language_model(ignore_index),
        at=("h", "tokens"),
        good={"h": floats(2, 3, 6), "tokens": np.array([[0, 4, 1], [2, 3, 0]])},
        bad={"h": floats(2, 3, 6), **bad},
        loss="from-model",
    )


_GATHERED: Arrays = {"h": floats(3, 6), "places": np.ones((3, 1), np.int64)}
_SEQUENCE: Arrays = {"h": floats(2, 3, 2, 5, 5)}
_ONE_FRAME: Arrays = {"h": floats(2, 1, 2, 5, 5)}


def _gather(**bad: np.ndarray) -> Case:
    return Case(
        build=build_gather,
        at=("h", "places"),
        good=_GATHERED,
        bad={**_GATHERED, **bad},
        end="ArrayMismatch",  # the operator ties both numbers of rows, so the client compares them
    )


def _select(rows: int, picks: int, kept: int) -> Case:
    def give(rows: int, picks: int, kept: int) -> Arrays:
        chosen = np.arange(picks) < kept
        return {"h": floats(rows, 6), "picks": np.ones((picks, 1), np.int64), "kept": chosen}

    return Case(
        build=build_selected_gather,
        at=("h", "picks", "kept"),
        good=give(3, 4, 3),
        bad=give(rows, picks, kept),
    )


def _quotient(operator: str, kind: str, whole: int, count: int) -> Case:
    dtype = np.dtype(kind)

    def divide(whole: int, count: int) -> Arrays:
        numbers = {
            "whole": np.array([[whole], [7]], dtype),
            "count": np.array([[count], [2]], dtype),
        }
        return {"h": floats(2, 6), **numbers}

    return Case(
        build=lambda: build_quotient(operator, onnx.helper.np_dtype_to_tensor_dtype(dtype)),
        at=("h", "whole", "count"),
        good=divide(9, 3),
        bad=divide(whole, count),
    )


def _frames(operator: str) -> Case:
    return Case(build=lambda: build_frames(operator), at=("h",), good=_SEQUENCE, bad=_ONE_FRAME)


def _window(operator: str, height: int, rounds_up: int = 0, end: str = "StageFailed") -> Case:
    """``height`` is the largest one of images for which the result has no rows."""
    return Case(
        build=lambda: build_windows(operator, (2 * height, 2), rounds_up),
        at=("h",),
        good={"h": floats(1, 16, 2 * height, 4)},
        bad={"h": floats(1, 16, height, 4)},
        end=end,
    )


TOO_SMALL: Mapping[str, Case] = {
    "an image smaller than a window": _window("MaxPool", 1, end="done"),
    "an image smaller than a window to average": _window("AveragePool", 1),
    "an image too small to round up": _window("MaxPool", 2, rounds_up=1, end="done"),
}
"""Images for which a pooling's result has no rows; what predicts of them would end the process."""
CASES: Mapping[str, Case] = {
    **TOO_SMALL,
    "rows that differ": _gather(places=np.ones((2, 1), np.int64)),
    "rows that are a multiple": _gather(h=floats(2, 6), places=np.ones((4, 1), np.int64)),
    "selected rows that differ": _select(3, 4, 2),
    "selected rows that are a multiple": _select(2, 4, 4),
    "no frame to filter": _frames("Conv"),
    "no frame to mix": _frames("Einsum"),
    "no frame to filter in a loop": Case(
        build=build_loop_of_frames,
        at=("h", "some"),
        good={"h": floats(2, 2, 5, 5), "some": np.array([2])},
        bad={"h": floats(2, 2, 5, 5), "some": np.array([0])},
    ),
    "no next token": _language({"h": floats(2, 1, 6), "tokens": np.ones((2, 1), np.int64)}),
    "a token beyond the classes": _language({"tokens": np.full((2, 3), 1 << 40)}),
    "a token below the classes": _language({"tokens": np.full((2, 3), -(1 << 20))}),
    "a token below the one to ignore": _language(
        {"tokens": np.full((2, 3), -(1 << 20))}, ignore_index=-100
    ),
    "no divisor": Case(
        build=build_division,
        at=("h", "count"),
        good={"h": floats(2, 6), "count": np.array([[3], [2]])},
        bad={"h": floats(2, 6), "count": np.array([[3], [0]])},
    ),
    "the smallest number by minus one": _quotient("Div", "i8", -(1 << 63), -1),
    "the smallest small number by minus one": _quotient("Div", "i4", -(1 << 31), -1),
    "the remainder of the smallest number by minus one": _quotient("Mod", "i8", -(1 << 63), -1),
    "no divisor of a byte": _quotient("Mod", "u1", 3, 0),
    "a diagonal far away": Case(
        build=build_triangle,
        at=("h", "count"),
        good={"h": floats(2, 6), "count": np.array(0)},
        bad={"h": floats(2, 6), "count": np.array(-(1 << 63))},
        end="done",
    ),
    **{
        name: Case(build=one.build, at=one.at, good=one.good, bad=one.bad, end=one.end)
        for name, one in KERNELS.items()
    },
}


def build_sampled_tail() -> onnx.ModelProto:
    """A client's tail that samples an image at places which the server computes."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w1", 4, 6), out="h")
    value = net.op("MatMul", value, net.weight("w2", 6, 8), out="places")
    grid = net.op("Reshape", value, net.constant("shape", np.array([-1, 2, 2, 2])), out="grid")
    value = net.op("GridSample", "image", grid, out="sampled", padding_mode="reflection")
    value = net.op("Flatten", value, out="flat")
    output = net.op("MatMul", value, net.weight("w3", 4, 4), out="scores")
    return net.finish({"x": (FLOAT, ["N", 4]), "image": (FLOAT, ["N", 1, 4, 4])}, output, 4)


def run_liar(target: Target) -> Iterator[tuple[str, str]]:
    """Let a server choose what a client's tail computes addresses from."""
    bundle = cut(
        build_sampled_tail(), at=("h",), tail_at=("places",), loss="cross-entropy",
        client_target=target,
    )  # fmt: skip
    client = Executor(bundle.client, ENGINE)
    key = TaskKey("s", "predict", 0, 0)
    client.begin(
        key, data={"x": floats(1, 4), "image": floats(1, 1, 4, 4)}, seed=0, learning_rate=0.1
    )
    try:
        list(client.advance(key))
        (name,) = [
            wire.tensor.name
            for wire in bundle.client.manifest.phase("predict").wires
            if wire.receiver == "client"
        ]
        client.deliver(key, {name: np.full((1, 8), 1e18, np.float32)})
        list(client.advance(key))
    except SplitonnxError as error:
        yield "predict bad", type(error).__name__
    else:
        yield "predict bad", "done"


def run(case: Case, target: Target) -> Iterator[tuple[str, str]]:
    """Give the server good and bad wires in each phase, and name what comes of it."""
    bundle = cut(case.build(), at=case.at, loss=case.loss, server_target=target)
    assert bundle.server is not None
    rows = len(case.good["h"]) if "places" in case.good or "count" in case.good else 1
    for phase in ("train", "predict"):
        names = [
            wire.tensor.name
            for wire in bundle.server.manifest.phase(phase).wires
            if wire.receiver == "server"
        ]
        for quality, given in (("good", case.good), ("bad", case.bad)):
            arrays = {"labels": np.zeros(rows, np.int64), **given}
            if "places" in given:
                arrays["labels"] = np.zeros(len(given["places"]), np.int64)
            wires = {name: arrays[name.split("@")[0]] for name in names}
            yield f"{phase} {quality}", perform(Executor(bundle.server, ENGINE), phase, wires)


def perform(server: Executor, phase: str, wires: Arrays) -> str:
    key = TaskKey("s", phase, 0, 0)
    server.begin(key, data={}, seed=0, learning_rate=0.1)
    try:
        server.deliver(key, wires)
        for group in server.advance(key):
            assert all(np.isfinite(array).all() for array in group.values())
    except SplitonnxError as error:
        return type(error).__name__
    assert server.is_finished(key)
    return "done"


ENGINE = Engine(threads=1)

LIAR = "a server that lies"

if __name__ == "__main__":
    chosen: Target = "portable" if "portable" in sys.argv else "training"
    for name in [*CASES, LIAR]:
        for task, end in run_liar(chosen) if name == LIAR else run(CASES[name], chosen):
            print(f"{name}, {task}: {end}", flush=True)
