"""The pass that gives a quantised model float weights."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from splitonnx.partitioner.cutting.passes.dequantizations import lift_integers
from splitonnx.partitioner.cutting.passes.work import Work
from splitonnx.partitioner.normalization.opsets import inline_functions
from tests.support.quantized_files import quantize

pytestmark = pytest.mark.filterwarnings("ignore")


def test_integer_arithmetic_is_replaced_only_if_the_user_asked_for_it() -> None:
    found = []
    for dequantize in (False, True):
        work = Work(model=ir.from_proto(quantize("perceptron", "dynamic")), dequantize=dequantize)
        inline_functions(work.model)
        lift_integers(work)
        found.append(work)
    kept, turned = found
    assert kept.dequantized is None
    assert "MatMulInteger" in [node.op_type for node in kept.model.graph]
    assert turned.dequantized is not None
    assert turned.dequantized.kinds == {"MatMulInteger": 2}
    assert {"W1", "W2"} <= turned.given
