"""Compare a cut model with the model given, by running both on random inputs.

onnx's reference evaluator and an ONNX Runtime session without optimizations say what the model
given computes.  Neither shares code with the passes that prepare and cut a model, so a mistake in
a pass is found before anything is trained.
"""
