"""Check inputs whose memory is read by its address, where ONNX Runtime does not check them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from splitonnx.runtime.engine.tiles.regions import FixedShape

_FLOAT = "tensor(float)"


def check_feed(name: str, feeds: Mapping[str, Any], shape: FixedShape) -> None:
    """Check an input whose memory is about to be read by its address."""
    if name not in feeds:
        raise ValueError(f"input '{name}' is missing")
    found = tuple(feeds[name].shape())
    if found != shape:
        raise ValueError(f"input '{name}' has the shape {list(found)} instead of {list(shape)}")
    if feeds[name].data_type() != _FLOAT:
        raise ValueError(f"input '{name}' is a {feeds[name].data_type()} instead of a {_FLOAT}")


def read_scalar(name: str, values: Mapping[str, Any]) -> np.ndarray:
    """Return a number as an array of no dimensions, which the caller keeps alive."""
    if name not in values:
        raise ValueError(f"input '{name}' is missing")
    found: np.ndarray = np.array(values[name].numpy())
    if found.size != 1 or found.dtype != np.float32:
        raise ValueError(
            f"'{name}' has the shape {list(found.shape)} and the type {found.dtype} instead of "
            "one element of the type float32"
        )
    return found.reshape(())
