"""Turn a model into a bundle: check, prepare, differentiate, lower it, and cut it into stages."""
