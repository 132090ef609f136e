"""A Scan over other axes, and in mixed directions, is written as one over first axes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from splitonnx.partitioner.inference.shapes import infer_shapes
from splitonnx.partitioner.rewrites import rewrite
from tests.partitioner.differentiation.control_flow.scan_models import (
    BOTH_SHAPES,
    hold_gradients,
    write_mixed,
)

MIXED = {
    "other axes": "scan_input_axes = [1, -1], scan_output_axes = [2, 1]",
    "mixed directions": "scan_input_axes = [1, 2], scan_input_directions = [1, 0], "
    "scan_output_directions = [0, 1]",
    "outputs from the end": "scan_input_axes = [1, 2], scan_output_directions = [1, 1], "
    "scan_output_axes = [-1, 0]",
}


@pytest.mark.parametrize("attributes", MIXED.values(), ids=list(MIXED))
def test_gradients_and_results_are_those_of_the_scan(attributes: str) -> None:
    joint, found = hold_gradients(write_mixed(attributes), ["s", "x", "z", "w"], shapes=BOTH_SHAPES)
    scans = [node for node in joint.graph if node.op_type == "Scan"]
    assert len(scans) == 2
    assert not any("axes" in name for node in scans for name in node.attributes)
    assert np.isfinite(found["loss"])


def test_a_scan_over_first_axes_in_one_direction_stays() -> None:
    model = ir.from_proto(
        write_mixed("scan_input_directions = [1, 1], scan_output_directions = [1, 1]")
    )
    infer_shapes(model)
    before = next(node for node in model.graph if node.op_type == "Scan")
    rewrite(model, ["w"])
    assert before in list(model.graph)
