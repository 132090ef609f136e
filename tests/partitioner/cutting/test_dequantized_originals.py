"""A dequantised model is held against the quantised one before its parts are held against it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

import splitonnx
from splitonnx.errors import DifferentResult
from splitonnx.partitioner.cutting import dequantized_originals
from splitonnx.partitioner.cutting.conformance.originals import (
    dequantize_original,
    read_comparable,
)
from splitonnx.partitioner.cutting.dequantized_originals import compare_dequantized
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.adjustments import NONE, Adjustments
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut
from tests.support.fused_models import run_stock
from tests.support.packed_models import build_packed, draw_packed
from tests.support.quantized_files import Form, build_float, draw, list_kinds, quantize, run

ASKED = Adjustments(dequantize=True)
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_model_compared_is_the_dequantized_one_if_the_option_is_used() -> None:
    model = quantize("perceptron", "dynamic")
    prepared = prepare(open_model(model, ASKED), adjustments=ASKED)
    assert list_kinds(read_comparable(model, prepared, 1000)) == {"MatMul", "Add", "Relu"}
    assert compare_dequantized(model, NONE, "the model") == []


@pytest.mark.parametrize(
    ("name", "form"),
    [("perceptron", "channels"), ("convolutions", "dynamic"), ("recurrence", "dynamic")],
)
def test_the_remark_says_by_how_much_rounding_changed_results(name: str, form: Form) -> None:
    (remark,) = compare_dequantized(quantize(name, form), ASKED, "the model")
    start = "--dequantize changed the results of the model by up to "
    assert remark.startswith(start)
    assert 1e-4 < float(remark.removeprefix(start).split()[0]) < 0.04


def test_a_model_that_is_rounded_with_stored_scales_stays_as_it_was() -> None:
    (remark,) = compare_dequantized(quantize("pools", "static"), ASKED, "the model")
    assert remark == "--dequantize left the results of the model as they were"


def spoil(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Return a copy of a model in which a weight has other numbers."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    (weight,) = (tensor for tensor in copied.graph.initializer if tensor.name == name)
    array = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(array[::-1].copy(), name))
    return copied


def test_weights_that_were_turned_wrongly_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = dequantize_original

    def turn_wrongly(model: onnx.ModelProto, *, is_rounding: bool = False) -> onnx.ModelProto:
        return spoil(turn(model, is_rounding=is_rounding), "W2")

    monkeypatch.setattr(dequantized_originals, "dequantize_original", turn_wrongly)
    with pytest.raises(DifferentResult, match="the dequantized model differs from the model"):
        compare_dequantized(quantize("perceptron", "dynamic"), ASKED, "the model")
    (remark,) = compare_dequantized(quantize("perceptron", "static"), ASKED, "the model")
    assert "according to ONNX Runtime's integer kernels, which round" in remark


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("level", [0, 1, 4])
def test_weights_of_a_few_bits_are_trained_whatever_the_accuracy_of_their_kernel(
    level: int, dequantize: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_packed(level=level)
    splitonnx.cut(model, at=None, loss="mse", dequantize=dequantize, check=True)
    told = [line for line in caplog.messages if "rounds activations to 8 bits" in line]
    assert len(told) == (level == 4)
    data = draw_packed()
    for line in told:
        assert "with accuracy_level=4 ('packed')" in line
        exact, rounded = (run_stock(build_packed(level=n), data)[0] for n in (0, 4))
        seen = np.abs(rounded - exact).max() / np.abs(exact).max()
        said = float(line.partition("changes the results of the model by ")[2].split()[0])
        assert seen / 10 < said < seen * 10


@pytest.mark.parametrize("name", ["w1", "packed_weight#float"])
def test_a_wrong_weight_is_caught_beside_a_kernel_that_rounds(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare_wrongly(*given: ir.Model, **options: object) -> PreparedModel:
        prepared = prepare(*given, **options)  # type: ignore[arg-type]
        array = prepared.weights[name].numpy() * np.float32(1.002)
        return replace(prepared, weights={**prepared.weights, name: ir.tensor(array, name=name)})

    monkeypatch.setattr("splitonnx.partitioner.partitions.prepare", prepare_wrongly)
    with pytest.raises(DifferentResult):
        cut(build_packed(level=4), at=None, loss="mse", check=True)


def test_a_whole_comparison_passes_for_each_form() -> None:
    for name, form in (("convolutions", "dynamic"), ("convolutions", "static channels")):
        given: Form = "dynamic" if form == "dynamic" else "static channels"
        cut(quantize(name, given), at=None, dequantize=True, check=True)


def test_an_old_opset_is_raised_where_it_has_no_scales_of_channels() -> None:
    model = quantize("convolutions", "static channels", 11)
    compared, x = dequantize_original(model), draw("convolutions")
    assert compared.opset_import[0].version >= 13
    np.testing.assert_allclose(run(compared, x), run(model, x), atol=0.02)
    assert run(build_float("convolutions", 11), x).shape == (6, 3)
