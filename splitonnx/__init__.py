"""Split learning on ONNX: cut any model, train its parts apart, exactly as the whole."""
