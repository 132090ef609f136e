"""Turn a model into a bundle: check, prepare, differentiate and lower it, and split it in stages."""
