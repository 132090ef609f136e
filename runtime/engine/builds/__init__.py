"""Which build of ONNX Runtime is installed."""
