"""A model in, a bundle out: gate, prepare, differentiate once, lower, cut into stages."""
