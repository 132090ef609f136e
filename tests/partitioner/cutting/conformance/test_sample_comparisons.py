"""A model whose fixed batch was freed is compared with the file's model, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from splitonnx.errors import BatchNotFreed, DifferentResult, MixedSamples
from splitonnx.partitioner.cutting.conformance.dataflow import Made, NotRun, expose, run_session
from splitonnx.partitioner.cutting.conformance.freed_batches import FreedBatch
from splitonnx.partitioner.cutting.conformance.sample_comparisons import (
    Subject,
    compare_samples,
    describe_unchecked,
)
from splitonnx.partitioner.cutting.conformance.samples import Arrays
from tests.support.nets import FLOAT, Net

Middle = list[tuple[str, list[Any], dict[str, Any]]]
"""Nodes in a row: the operator, the constants that it reads after the value, its attributes."""
WIDTH = 6


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def build(middle: Middle, *shape: int | str) -> onnx.ModelProto:
    """Build a model with ``middle`` between two products; its tensors are m, t0, t1, ..., y."""
    net = Net()
    value = net.op("MatMul", "x", net.weight("w", 4, WIDTH), out="m")
    for index, (kind, constants, attributes) in enumerate(middle):
        read = [net.constant(f"c{index}_{n}", array) for n, array in enumerate(constants)]
        value = net.op(kind, value, *read, out=f"t{index}", **attributes)
    value = net.op("MatMul", value, net.weight("v", WIDTH, 3), out="y")
    graph = helper.make_graph(
        net.nodes,
        "samples",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [onnx.ValueInfoProto(name=value)],
        net.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def free(rows: int, options: str = "--dim x:0=N") -> FreedBatch:
    return FreedBatch(
        places=(("x", 0),), sizes={("x", 0): rows}, rows=rows, counts=(2, 3), options=options
    )


def run(model: onnx.ModelProto) -> Callable[[Any], list[Arrays]]:
    content = model.SerializeToString()
    return lambda batches: run_session(content, batches, "it", level="none")


def compare(
    middle: Middle, *rest: int, rows: int = 1, options: str = "--dim x:0=N", **subject: Any
) -> list[str]:
    model = build(middle, "N", *rest, 4)
    made = Made(label="it", run=run(model), trace=run(expose(build(middle, "N", *rest, 4))))
    named = Subject(name="m.onnx", original=model, **subject)
    return compare_samples(free(rows, options), named, [made])


MIXING: dict[str, tuple[Middle, str]] = {
    "Reshape takes the batch into the steps": (
        [("Reshape", [ints(1, -1, WIDTH)], {}), ("ReduceMean", [ints(1)], {"keepdims": 0})],
        "t0",
    ),
    "ReduceMean over samples and steps": (
        [("ReduceMean", [ints(0, 1)], {"keepdims": 0}), ("Unsqueeze", [ints(0)], {})],
        "t0",
    ),
    "Softmax along the batch": ([("Softmax", [], {"axis": 0})], "t0"),
    "CumSum along the batch": ([("CumSum", [np.array(0)], {})], "t0"),
    "the first sample alone": ([("Gather", [ints(0)], {"axis": 0})], "t0"),
    "a sum that is 1 for any batch": (
        [("ReduceMean", [ints(0)], {"keepdims": 1}), ("Softmax", [], {"axis": 0})],
        "t0",
    ),
    "the best of the samples": ([("ReduceMax", [ints(0)], {"keepdims": 1})], "t0"),
    "Flatten of everything": (
        [
            ("Flatten", [], {"axis": 0}),
            ("Reshape", [ints(-1, 5, 2, 3)], {}),
            ("Transpose", [], {"perm": [2, 1, 0, 3]}),
            ("Reshape", [ints(-1, 5, WIDTH)], {}),
        ],
        "t0",
    ),
    "Transpose and another Reshape": (
        [("Transpose", [], {"perm": [1, 0, 2]}), ("Reshape", [ints(-1, 5, WIDTH)], {})],
        "t1",
    ),
}


@pytest.mark.parametrize("case", MIXING)
def test_a_node_that_mixes_samples_is_refused_by_name(case: str) -> None:
    middle, first = MIXING[case]
    with pytest.raises(MixedSamples) as caught:
        compare(middle, 5)
    assert (caught.value.node, caught.value.tensor) == (f"{first}_node", first)
    assert (caught.value.output, caught.value.rows) == ("y", 1)


ALONE: dict[str, Middle] = {
    "steps before samples": [
        ("Transpose", [], {"perm": [1, 0, 2]}),
        ("Reshape", [ints(-1, WIDTH)], {}),
        ("Tanh", [], {}),
        ("Reshape", [ints(5, -1, WIDTH)], {}),
        ("ReduceMean", [ints(0)], {"keepdims": 0}),
    ],
    "samples and steps in one axis": [("Reshape", [ints(-1, WIDTH)], {})],
    "attention between steps": [("Softmax", [], {"axis": 1}), ("ReduceSum", [ints(1)], {})],
}


@pytest.mark.parametrize("case", ALONE)
def test_samples_that_stay_apart_are_taken(case: str) -> None:
    assert compare(ALONE[case], 5) == []


def test_a_model_that_runs_for_one_sample_only_is_refused() -> None:
    with pytest.raises(BatchNotFreed) as caught:
        compare([("Squeeze", [ints(0)], {}), ("Unsqueeze", [ints(0)], {})])
    assert (caught.value.tried, caught.value.rows) == (2, 1)
    assert "t0_node" in str(caught.value)


def test_samples_of_a_fixed_batch_may_be_mixed_on_purpose() -> None:
    (remark,) = compare([("Softmax", [], {"axis": 0})], rows=4)
    assert "mixes the 4 samples of a batch itself" in remark
    with pytest.raises(MixedSamples) as caught:
        compare(
            [
                ("Reshape", [ints(4, -1, 2)], {}),
                ("Softmax", [], {"axis": 1}),
                ("Reshape", [ints(-1, WIDTH)], {}),
            ],
            rows=4,
        )
    assert caught.value.node == "t0_node"
    assert "each 4 samples alone" in str(caught.value)


def test_what_nobody_asked_for_is_remarked_on() -> None:
    (remark,) = compare([("Softmax", [], {"axis": 0})], options="")
    assert "node 't0_node' (Softmax) of m.onnx mixes samples" in remark
    assert "--dim x:0=1" in remark


def test_a_mistake_in_a_node_that_preparation_changed_is_owned_up() -> None:
    with pytest.raises(DifferentResult) as caught:
        compare([("Softmax", [], {"axis": 0})], options="", freed=("t0_node",))
    assert caught.value.first == "t0"


NORM = [np.ones(5, np.float32), *[np.zeros(5, np.float32)] * 2, np.ones(5, np.float32)]


def test_what_is_normalized_over_mixed_samples_is_refused_though_predictions_are_equal() -> None:
    back: Middle = [("Reshape", [ints(-1, 5, WIDTH)], {})]
    norm: Middle = [("BatchNormalization", NORM, {})]
    assert compare(norm, 5) == []
    with pytest.raises(MixedSamples) as caught:
        compare([("Reshape", [ints(1, 5, -1)], {}), *norm, *back], 5)
    assert caught.value.node == "t0_node"


def test_a_loss_in_the_model_is_the_mean_over_samples() -> None:
    mean: Middle = [("Mul", [np.float32(3)], {}), ("ReduceMean", [], {"keepdims": 1})]
    root: Middle = [*mean, ("Exp", [], {})]

    def hold(middle: Middle) -> list[str]:
        model = build(middle, "N", 4)
        del model.graph.node[-1]
        loss = model.graph.node[-1].output[0]
        model.graph.output[0].name = loss
        traced = onnx.ModelProto()
        traced.CopyFrom(model)
        made = Made(label="it", run=run(model), trace=run(expose(traced)))
        return compare_samples(
            free(1), Subject(name="m.onnx", original=model, has_loss=True), [made]
        )

    assert hold(mean) == []
    with pytest.raises(MixedSamples) as caught:
        hold(root)
    assert caught.value.operator == "Exp"


def test_a_size_that_cannot_be_compared_is_said_to_be_unchecked() -> None:
    def refuse(_: Any) -> list[Arrays]:
        raise NotRun("too large")

    length = FreedBatch(
        places=(("x", 1),), sizes={("x", 1): 5}, rows=5, counts=(), options="--dim x:1=T"
    )
    subject = Subject(name="it", original=build([], "N", 4))
    (remark,) = compare_samples(length, subject, [])
    assert remark.startswith("--dim x:1=T: nodes that the exporter wrote")
    assert "cannot be checked" in remark
    assert describe_unchecked([free(1, "")]) == []
    (remark,) = describe_unchecked([free(1)], "no time")
    assert "may mix samples, which was not checked (no time)" in remark
    made = Made(label="it", run=refuse, trace=refuse)
    (remark,) = compare_samples(free(1, ""), subject, [made])
    assert remark == (
        "it still takes a batch of 1 only (too large with more); export it again with a dynamic "
        "batch, or keep batches of 1 with --dim x:0=1"
    )


def test_what_no_single_sample_passes_is_not_laid_on_the_number_of_samples() -> None:
    net = Net()
    weights = net.weight("w", 1, 9, 4), net.weight("r", 1, 9, 3)
    net.op("GRU", "x", *weights, out="y", hidden_size=3, layout=1)  # not in ONNX Runtime
    model = net.finish({"x": (FLOAT, ["N", 5, 4])}, "y", 5, 1, 3)

    def refuse(_: Any) -> list[Arrays]:
        raise NotRun("a length is negative")

    made = Made(label="it", run=refuse, trace=refuse)
    (remark,) = compare_samples(free(1), Subject(name="it", original=model), [made])
    assert "was not checked (a length is negative)" in remark
