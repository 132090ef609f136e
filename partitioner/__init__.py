"""Turn a model into a bundle: check it, differentiate it, and split it into each party's stages."""
