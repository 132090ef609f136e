"""Turn the integer arithmetic of quantized models into arithmetic with floats.

This room holds the formulas of the operators that ONNX Runtime's quantization tools write.  It does
not deal with pairs of QuantizeLinear and DequantizeLinear, which :mod:`quantizations` trains as
they are.  It may use what :mod:`normalization` may use.
"""
