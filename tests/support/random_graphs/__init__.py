"""Draw random ONNX models by Hypothesis, and try what a cut makes of them.

``builders`` grows a model node by node.  ``elementwise``, ``layers``, ``reshapes``, ``selections``
and ``rarities`` draw one operator each with its attributes, and ``models`` puts a model together.
``trials`` cuts a model and holds the parts against onnx's own evaluator in float64, and ``sweeps``
counts what came of many.
"""
