"""Compare a cut model with the original model by running both on random inputs.

The original is the model that the user cuts.  onnx's reference evaluator and an ONNX Runtime
session without optimizations compute the expected results.  Neither shares code with the
passes that prepare and cut a model, so a mistake in a pass is found before training.
"""
