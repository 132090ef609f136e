"""What the nodes of a graph say of the tensors that they read, whatever their names are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import helper

from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.normalization.constants.structures import (
    find_power_vectors,
    is_time_step,
)
from tests.support.nets import FLOAT, INT64, Net


def prepare_net(net: Net, output: str, size: int) -> PreparedModel:
    return prepare(open_model(net.finish({"x": (FLOAT, ["N", 4])}, output, size)))


def find_vectors(net: Net, divisor: str) -> set[str]:
    """Divide the weight ``w`` of 5 rows and 4 columns, and find what a power iteration keeps."""
    scaled = net.op("Div", "w", divisor, out="scaled")
    turned = net.op("Transpose", scaled, out="turned", perm=[1, 0])
    prepared = prepare_net(net, net.op("MatMul", "x", turned, out="y"), 5)
    return find_power_vectors(prepared.skeleton.graph, prepared.weights)


def begin_norm() -> Net:
    net = Net()
    net.weight("w", 5, 4)
    net.weight("left", 5)
    net.weight("right", 4)
    return net


def test_vectors_around_a_matrix_in_its_divisor_are_those_of_a_spectral_norm() -> None:
    net = begin_norm()
    divisor = net.op("MatMul", "left", net.op("MatMul", "w", "right", out="wv"), out="norm")
    assert find_vectors(net, divisor) == {"left", "right"}


def test_a_spectral_norm_is_found_as_a_sum_of_products_and_behind_changes_of_shape() -> None:
    net = begin_norm()
    column = net.op("Unsqueeze", "right", net.constant("axis", np.array([1])), out="column")
    product = net.op("MatMul", "w", column, out="wv")
    flat = net.op("Reshape", product, net.constant("flat", np.array([-1])), out="flattened")
    divisor = net.op("ReduceSum", net.op("Mul", "left", flat, out="each"), out="norm", keepdims=0)
    assert find_vectors(net, divisor) == {"left", "right"}


def test_a_vector_from_which_an_iteration_in_the_graph_begins_is_found_alone() -> None:
    net = begin_norm()
    turned = net.op("Transpose", "w", out="wt", perm=[1, 0])
    step = net.op("MatMul", turned, "left", out="step")
    length = net.op("ReduceL2", step, out="length", keepdims=1)
    best = net.op("Div", step, length, out="best")
    divisor = net.op("ReduceL2", net.op("MatMul", "w", best, out="wv"), out="norm", keepdims=0)
    assert find_vectors(net, divisor) == {"left"}


def test_vectors_that_something_else_reads_and_the_gain_of_a_weight_norm_are_learned() -> None:
    net = begin_norm()
    divisor = net.op("MatMul", "left", net.op("MatMul", "w", "right", out="wv"), out="norm")
    scaled = net.op("Div", "w", divisor, out="scaled")
    turned = net.op("Transpose", scaled, out="turned", perm=[1, 0])
    made = net.op("Add", net.op("MatMul", "x", turned, out="m"), "left", out="y")
    prepared = prepare_net(net, made, 5)
    assert find_power_vectors(prepared.skeleton.graph, prepared.weights) == set()

    net = begin_norm()
    scaled = net.op("Mul", "w", "right", out="gained")
    assert find_vectors(net, net.op("ReduceL2", scaled, out="norm", keepdims=0)) == set()


def build_scan(numbers: np.ndarray, *, kind: str = "Mul") -> PreparedModel:
    """A Scan that multiplies by one number in each step, or does something else with it."""
    net = Net()
    state = net.op("MatMul", "x", net.weight("w0", 4, 4), out="h0")
    net.constant("dt", numbers.astype(np.float32))
    net.weight("w", 4, 4)
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["h", "w"], ["product"]),
            helper.make_node("Tanh", ["product"], ["slope"]),
            helper.make_node(kind, ["slope", "step"], ["change"]),
            helper.make_node("Add", ["h", "change"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("h", FLOAT, ["N", 4]),
            helper.make_tensor_value_info("step", FLOAT, list(numbers.shape[1:])),
        ],
        [helper.make_tensor_value_info("next", FLOAT, ["N", 4])],
    )
    return prepare_net(net, net.op("Scan", state, "dt", out="y", body=body, num_scan_inputs=1), 4)


def looks_like_steps(prepared: PreparedModel, name: str = "dt") -> bool:
    (value,) = (v for v in prepared.skeleton.graph.inputs if v.name == name)
    return is_time_step(value, prepared.weights[name].numpy())


UNIFORM, UNEVEN = np.full(5, 0.1), np.array([0.1, 0.3, 0.05, 0.2])


@pytest.mark.parametrize(
    "numbers", [UNIFORM, UNEVEN, UNIFORM[:, None], np.full(400, 0.01), np.full((2, 1), 0.5)]
)
def test_positive_factors_of_a_scan_are_step_sizes(numbers: np.ndarray) -> None:
    assert looks_like_steps(build_scan(numbers))


@pytest.mark.parametrize("numbers", [-UNIFORM, UNEVEN - 0.1, np.zeros(5), np.ones((5, 4))])
def test_factors_that_are_zero_or_negative_and_rows_of_several_are_learned(
    numbers: np.ndarray,
) -> None:
    assert not looks_like_steps(build_scan(numbers))


def test_numbers_that_a_scan_adds_are_no_step_sizes() -> None:
    assert not looks_like_steps(build_scan(UNIFORM, kind="Add"))


def gather_each(net: Net, name: str, count: int) -> Sequence[str]:
    return [
        net.op("Gather", name, net.constant(f"place{i}", np.array(i)), out=f"{name}{i}")
        for i in range(count)
    ]


def test_times_of_which_each_step_reads_the_difference_of_two_are_found() -> None:
    net = Net()
    net.constant("dt", np.array([0, 0.25, 0.5, 1.0], np.float32))
    times = gather_each(net, "dt", 4)
    state = "x"
    for i, (now, then) in enumerate(pairwise(times)):
        step = net.op("Sub", then, now, out=f"step{i}")
        slope = net.op("MatMul", state, net.weight(f"w{i}", 4, 4), out=f"slope{i}")
        change = net.op("Mul", slope, step, out=f"change{i}")
        state = net.op("Add", state, change, out=f"state{i}")
    assert looks_like_steps(prepare_net(net, state, 4))


def test_a_gain_of_channels_is_no_step_size() -> None:
    net = Net()
    net.constant("dt", UNEVEN.astype(np.float32))
    hidden = net.op("MatMul", "x", net.weight("w", 4, 4), out="h")
    assert not looks_like_steps(prepare_net(net, net.op("Mul", hidden, "dt", out="y"), 4))


def test_step_sizes_that_a_loop_gathers_by_its_count_are_found() -> None:
    net = Net()
    state = net.op("MatMul", "x", net.weight("w0", 4, 4), out="h0")
    net.constant("dt", UNEVEN.astype(np.float32))
    net.weight("w", 4, 4)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["going"]),
            helper.make_node("MatMul", ["h", "w"], ["slope"]),
            helper.make_node("Gather", ["dt", "i"], ["step"]),
            helper.make_node("Mul", ["slope", "step"], ["change"]),
            helper.make_node("Add", ["h", "change"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("go", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("h", FLOAT, ["N", 4]),
        ],
        [
            helper.make_tensor_value_info("going", onnx.TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, ["N", 4]),
        ],
    )
    trips = net.constant("trips", np.array(4))
    yes = net.constant("yes", np.array(True))
    made = net.op("Loop", trips, yes, state, out="y", body=body)
    prepared = prepare_net(net, made, 4)
    assert "dt" in prepared.trainable
    assert looks_like_steps(prepared)
