"""Differentiate Scan nodes, which onnxruntime-training cannot.

Only Scan nodes that splitonnx wrote itself are differentiated, such as those of recurrent layers.
The modules here may import the modules beside this package that call the gradient builder, but not
:mod:`gradients`, which differentiates a whole model.
"""
