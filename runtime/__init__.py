"""Train and run the parts of a bundle: run each stage when its inputs exist, exchange tensors."""
