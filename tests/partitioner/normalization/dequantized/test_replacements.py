"""Which models are dequantised, and what is said of it."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from splitonnx.errors import UsageError
from splitonnx.partitioner.normalization.dequantized.replacements import dequantize
from splitonnx.partitioner.normalization.opsets import inline_functions
from tests.support.quantized_files import build_float, quantize


@pytest.mark.filterwarnings("ignore")
def test_a_sentence_names_operators_weights_and_what_the_merged_model_will_be() -> None:
    model = ir.from_proto(quantize("convolutions", "dynamic"))
    inline_functions(model)
    told = dequantize(model).describe()
    assert "turned 2 ConvInteger, 1 MatMulInteger into" in told
    assert "'K1', 'K2', 'W'; activations" in told
    assert "stay floats in the merged model" in told
    assert "QDQ" not in told


@pytest.mark.filterwarnings("ignore")
def test_integers_from_end_to_end_stay_rounded() -> None:
    model = ir.from_proto(quantize("perceptron", "static"))
    inline_functions(model)
    told = dequantize(model).describe()
    assert "turned 2 QLinearAdd, 2 QLinearMatMul into" in told
    assert "still rounded with the stored scales" in told
    assert "no longer" not in told


@pytest.mark.filterwarnings("ignore")
def test_the_model_given_is_left_as_it_was() -> None:
    proto = quantize("convolutions", "static")
    before = proto.SerializeToString(deterministic=True)
    model = ir.from_proto(proto)
    inline_functions(model)
    dequantize(model)
    assert proto.SerializeToString(deterministic=True) == before


def test_a_float_model_is_refused() -> None:
    model = ir.from_proto(build_float("perceptron"))
    inline_functions(model)
    with pytest.raises(UsageError, match="--dequantize is for models that compute with integers"):
        dequantize(model)
