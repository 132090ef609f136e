"""A branch that a setting of the model decides, as a sampling rate, trains once it is bound."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.bundles import Bundle
from splitonnx.errors import NotDifferentiable
from splitonnx.manifests import Role
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS


def build_rated(*, noisy: bool = False) -> onnx.ModelProto:
    """Build a layer for one sampling rate, and another layer for all other rates.

    ``noisy`` means that both draw random numbers, so that no gradient can pass through.
    """
    noise = [helper.make_node("RandomNormalLike", ["h"], ["noise"])] if noisy else []
    layers = [
        helper.make_graph(
            [*noise, helper.make_node("MatMul", ["h", weight], [out])], out, [],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, ["N", 6])],
        )
        for weight, out in (("fast", "f"), ("slow", "s"))
    ]  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["h"]),
        helper.make_node("Equal", ["rate", "known"], ["is_known"]),
        helper.make_node("If", ["is_known"], ["z"], then_branch=layers[0], else_branch=layers[1]),
        helper.make_node("MatMul", ["z", "last"], ["y"]),
    ]
    random = np.random.default_rng(0)
    shapes = {"first": (4, 6), "fast": (6, 6), "slow": (6, 6), "last": (6, 3)}
    weights = [
        numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    graph = helper.make_graph(
        nodes, "rated",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4]),
         helper.make_tensor_value_info("rate", TensorProto.INT64, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [*weights, numpy_helper.from_array(np.array(16000), "known")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_branch_that_a_setting_decides_is_trained_alone() -> None:
    assert list_trained(cut(build_rated(), at=None)) == {"first", "fast", "slow", "last"}
    for rate, weight in ((16000, "fast"), (8000, "slow")):
        bundle = cut(build_rated(), at=None, bind={"rate": rate})
        assert list_trained(bundle) == {"first", weight, "last"}


def test_a_setting_that_differs_from_batch_to_batch_trains_its_own_branch() -> None:
    random = np.random.default_rng(1)
    batches = [
        {
            "x": random.standard_normal((5, 4)).astype(np.float32),
            "rate": np.array(rate),
            "labels": random.integers(0, 3, 5),
        }
        for rate in (16000, 8000, 16000)
    ]
    for target in TARGETS:
        bundle = cut(build_rated(), at=["h", "rate"], client_target=target, server_target=target)
        assert verify(bundle, batches, steps=3).largest_difference == 0.0


def test_a_setting_decides_a_branch_that_draws_numbers() -> None:
    with pytest.raises(NotDifferentiable, match="input 'rate', which --bind rate=VALUE fixes; oth"):
        cut(build_rated(noisy=True), at=None)
    assert "--bind rate=VALUE" in check(build_rated(noisy=True)).obstacles[0]


def list_trained(bundle: Bundle) -> set[str]:
    state = bundle.client.manifest.state
    return {each.tensor.name for each in state if each.role is Role.PARAMETER}
