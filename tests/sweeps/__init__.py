"""Real networks in full depth, exported by real frameworks; see __main__.py."""
