"""Gradients of a few nodes, held on both targets against float64 finite differences."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut_prepared
from tests.support.case_trials import FLOOR, RTOL, TARGETS, run_step
from tests.support.oracles import differentiate_numerically, make_evaluator
from tests.support.zoo import FLOAT

Arrays = Mapping[str, np.ndarray]
Evaluate = Callable[[Arrays], Mapping[str, np.ndarray]]


def hold_gradients(
    nodes: Sequence[NodeProto],
    arrays: Arrays,
    outputs: Sequence[str],
    *,
    evaluate: Evaluate | None = None,
    opset: int = 18,
    dynamic: Mapping[str, int] | None = None,
    constants: Collection[str] = (),
    entries: int = 5,
) -> None:
    """Cut ``nodes`` whole on both targets and hold loss and gradients against ``evaluate``.

    Float arrays are parameters but for scalars and those in ``constants``.  One in ``dynamic`` is
    data whose extent along that axis the model does not know, times a parameter of ones.  The
    loss is the sum of all outputs, each times a random tensor.
    """
    dynamic = dynamic or {}
    evaluate = evaluate or _refer(nodes, arrays, outputs, opset)
    wide = {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in arrays.items()}
    random = np.random.default_rng(7)
    shares = {
        name: random.uniform(0.5, 1.5, np.shape(array)) * random.choice([-1, 1], np.shape(array))
        for name, array in evaluate(wide).items()
    }

    def measure() -> float:
        found = evaluate(wide)
        return sum(float(np.sum(found[name] * shares[name])) for name in outputs)

    model = _build_model(nodes, arrays, shares, opset, dynamic, constants)
    data = {name: arrays[name] for name in dynamic}
    data |= {f"{name}.share": share.astype(np.float32) for name, share in shares.items()}
    floats = [n for n, a in arrays.items() if a.dtype == np.float32 and n not in constants]
    trained = [name for name in floats if arrays[name].ndim]
    weights = [f"{name}.scale" if name in dynamic else name for name in trained]
    patterns = [f"^{re.escape(weight)}$" for weight in weights]
    expected = measure()
    numeric = {
        name: list(differentiate_numerically(measure, wide[name], entries=entries))
        for name in trained
        if name not in dynamic
    }
    prepared = prepare(open_model(model), train=patterns)
    for target in TARGETS:
        bundle = cut_prepared(
            prepared, at=None, loss="from-model", output="total",
            client_target=target, server_target=target,
        )  # fmt: skip
        found = run_step(bundle, data)
        size = max(1.0, *(float(np.abs(share).sum()) for share in shares.values()))
        assert abs(float(found["loss"]) - expected) <= 1e-5 * size, target
        for name in trained:
            gradient = found[f"{name}.scale_grad" if name in dynamic else f"{name}_grad"]
            if name in dynamic:  # d/d scale = sum of x * d/dx along the axis: take all of x's part
                _hold_scale(gradient, wide[name], dynamic[name], measure, f"{target}: {name}")
                continue
            slopes = numeric[name]
            scale = max(float(np.abs(gradient).max()), *(abs(slope) for _, slope in slopes))
            for index, slope in slopes:
                off = abs(float(gradient[index]) - slope)
                assert off <= max(RTOL * scale, FLOOR), f"{target}: {name}{index}"


def _hold_scale(
    gradient: np.ndarray, array: np.ndarray, axis: int, measure: Callable[[], float], what: str
) -> None:
    """Hold a few entries of the gradient to a scale of ones along ``axis``."""
    kept = array.copy()
    largest = float(np.abs(gradient).max())
    for place in np.random.default_rng(0).permutation(gradient.size)[:4]:
        index: list[int | slice] = list(np.unravel_index(place, gradient.shape))
        index[axis] = slice(None)
        step = 1e-6
        array[tuple(index)] = kept[tuple(index)] * (1 + step)
        above = measure()
        array[tuple(index)] = kept[tuple(index)] * (1 - step)
        below = measure()
        array[...] = kept
        slope = (above - below) / (2 * step)
        index[axis] = 0
        off = abs(float(gradient[tuple(index)]) - slope)
        assert off <= max(RTOL * max(largest, abs(slope)), FLOOR), f"{what}{index}"


def _refer(
    nodes: Sequence[NodeProto], arrays: Arrays, outputs: Sequence[str], opset: int
) -> Evaluate:
    graph = helper.make_graph(
        list(nodes),
        "reference",
        [
            helper.make_tensor_value_info(
                name,
                helper.np_dtype_to_tensor_dtype(
                    np.dtype(np.float64) if array.dtype.kind == "f" else array.dtype
                ),
                array.shape,
            )
            for name, array in arrays.items()
        ],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    evaluator = make_evaluator(model)

    def evaluate(feeds: Arrays) -> Mapping[str, np.ndarray]:
        return dict(zip(outputs, evaluator.run(None, dict(feeds)), strict=True))

    return evaluate


def _build_model(
    nodes: Sequence[NodeProto],
    arrays: Arrays,
    shares: Arrays,
    opset: int,
    dynamic: Mapping[str, int],
    constants: Collection[str],
) -> ModelProto:
    inputs, weights, before, after = [], [], [], []
    for name, array in arrays.items():
        if name in dynamic:
            dims: list[int | str] = list(array.shape)
            dims[dynamic[name]] = f"N{array.shape[dynamic[name]]}"
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            if array.dtype.kind != "f":
                inputs.append(helper.make_tensor_value_info(name, kind, dims))
                continue
            inputs.append(helper.make_tensor_value_info(name, kind, dims))
            shape = list(array.shape)
            shape[dynamic[name]] = 1
            weights.append(numpy_helper.from_array(np.ones(shape, np.float32), f"{name}.scale"))
            before.append(helper.make_node("Mul", [name, f"{name}.scale"], [f"{name}.scaled"]))
        elif name in constants and array.dtype.kind == "f":
            value = numpy_helper.from_array(array, name)
            before.append(helper.make_node("Constant", [], [name], value=value))
        else:
            weights.append(numpy_helper.from_array(array, name))
    total = ""
    for name, share in shares.items():
        inputs.append(helper.make_tensor_value_info(f"{name}.share", FLOAT, [None] * share.ndim))
        after.append(helper.make_node("Mul", [name, f"{name}.share"], [f"{name}.product"]))
        after.append(
            helper.make_node("ReduceSum", [f"{name}.product"], [f"{name}.sum"], keepdims=0)
        )
        if total:
            after.append(helper.make_node("Add", [total, f"{name}.sum"], [f"{name}.total"]))
        total = f"{name}.total" if total else f"{name}.sum"
    after.append(helper.make_node("Identity", [total], ["total"]))
    renamed = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        for index, name in enumerate(copy.input):
            if name in dynamic and arrays[name].dtype.kind == "f":
                copy.input[index] = f"{name}.scaled"
        renamed.append(copy)
    loss = helper.make_tensor_value_info("total", FLOAT, [])
    graph = helper.make_graph([*before, *renamed, *after], "case", inputs, [loss], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
