"""Shapes that a file declares wrongly, since its inputs were changed or its exporter erred."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import inspect
from splitonnx.verifications import verify
from tests.conftest import ROOT
from tests.support.case_trials import TARGETS
from tests.support.nets import FLOAT, Net
from tests.support.small_models import Arrays, hold_predictions


def build(**declared: list[int | str]) -> onnx.ModelProto:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 6, 5), out="h")
    net.op("Relu", "h", out="r")
    net.op("MatMul", "r", net.weight("v", 5, 3), out="y")
    model = net.finish({"x": (FLOAT, ["N", 6])}, "y", 3)
    for name, shape in declared.items():
        model.graph.value_info.append(helper.make_tensor_value_info(name, FLOAT, shape))
    return model


@pytest.mark.parametrize("target", TARGETS)
def test_a_batch_of_1_that_is_left_behind_a_freed_input_is_not_believed(target: Target) -> None:
    """As tools leave it that change the dimensions of inputs alone."""
    model = build(h=[1, 5], r=[1, 5])
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert [found.shape for found in inspect(model)] == [("N", 5), ("N", 5)]
    random = np.random.default_rng(0)
    data: Arrays = {
        "x": random.standard_normal((8, 6)).astype(np.float32),
        "labels": np.arange(8) % 3,
    }
    bundle = cut(model, at="h", client_target=target, server_target=target)
    hold_predictions(bundle, build(), {"x": data["x"]})
    assert verify(bundle, data, batch_size=4).ok


@pytest.mark.parametrize("shape", [["N", 7], ["N"], [1, "N", 5]])
def test_other_sizes_and_ranks_are_not_believed(shape: list[int | str]) -> None:
    assert [found.shape for found in inspect(build(h=shape))] == [("N", 5), ("N", 5)]


def test_a_size_that_only_the_file_knows_is_believed() -> None:
    model = build(h=["N", 5])
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"
    assert [found.shape for found in inspect(model)] == [("N", 5), ("N", 5)]


def test_an_export_that_declares_channels_last_has_them_first() -> None:
    found = {each.tensor: each.shape for each in inspect(ROOT / "tests/exports/jax-cnn.onnx")}
    assert found["relu_out_0"] == ("N", 4, 8, 8)
