"""Write ``digits.bin``: scikit-learn's 1,797 handwritten digits for the page to train on.

    python examples/browser/make_digits.py [PATH]

Two 32-bit counts, little-endian: digits to train on, digits held out; then each digit's 64 pixels
from 0 to 16 and its label, a byte each.  They are divided as in ``examples/demo.py``.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

HELD_OUT = 360
"""Digits."""


def make_digits() -> bytes:
    """Make the file's content."""
    digits = load_digits()
    rows = np.column_stack([digits.data, digits.target]).astype(np.uint8)  # (1797, 65)
    order = np.random.RandomState(0).permutation(len(rows))
    divided = rows[np.concatenate([order[HELD_OUT:], order[:HELD_OUT]])]
    counts = struct.pack("<II", len(rows) - HELD_OUT, HELD_OUT)
    return b"".join([counts, divided.tobytes()])


def main() -> None:
    """Write the file to the path given, or beside this script."""
    default = Path(__file__).with_name("digits.bin")
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    path.write_bytes(make_digits())


if __name__ == "__main__":
    main()
