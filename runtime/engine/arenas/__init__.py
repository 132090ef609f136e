"""Where ONNX Runtime keeps the tensors of stages: one arena for all sessions of a process."""
