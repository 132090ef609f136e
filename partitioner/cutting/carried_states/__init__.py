"""States that a model hands itself from step to step: which they are, and which party keeps them.

Which raw inputs they hold is found here, too.
What training does with them is in the manifest: the runtime replaces them like running statistics.
Modules here may import the preparation and the partition of a model, and no losses or gradients;
``raw_inputs`` also uses what :mod:`label_traces` knows of layers.
"""
