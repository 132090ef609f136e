"""Networks that packages of PyPI ship, and how their data are drawn; shipped.py trains them.

The table is shipped.toml.  This module reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

BATCH, STEPS = 2, 3
"""Samples in a step, and steps."""


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a package, and how it is trained.

    ``path`` is the file's path within the package, ``options`` are those of ``cut``, each with its
    value.  ``send`` names the raw inputs that may cross beside the tensor of the cut; ``at`` names
    the tensors of the cut where ``inspect`` lists none that is good.
    ``arrays`` and ``labels`` say how arrays of one sample are drawn, as :func:`draw` reads it.
    With ``whole_batches`` they are of a whole batch, and the data are one file for each batch: for
    networks that do not have the batch on the first axis of every array.
    """

    name: str
    kind: str
    package: str
    version: str
    path: str
    sha256: str
    arrays: dict[str, str]
    labels: str
    options: tuple[str, ...] = ()
    loss: str = "mse"
    send: tuple[str, ...] = ()
    at: tuple[str, ...] = ()
    whole_batches: bool = False


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    network: tuple[Network, ...]


def read_networks() -> tuple[Network, ...]:
    """Read the table."""
    table = Path(__file__).with_name("shipped.toml").read_bytes()
    return msgspec.toml.decode(table, type=_Table).network


def draw_batches(network: Network, random: np.random.Generator) -> list[Mapping[str, np.ndarray]]:
    """Draw the data and labels of all steps: one array of all samples, or each batch by itself."""
    described = {**network.arrays, "labels": network.labels}
    rows, count = ((), STEPS) if network.whole_batches else ((BATCH * STEPS,), 1)
    return [
        {name: draw(text, rows, random) for name, text in described.items()} for _ in range(count)
    ]


def draw(text: str, rows: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Draw an array whose type and shape ``text`` describes, behind the axes ``rows``.

    ``f4 3 160`` are normal numbers of shape 3 x 160, ``i8 3 < 20`` whole numbers from 0 to 19, and
    ``? 3 = 1`` is filled with ones, as a mask that hides nothing.
    """
    described, _, value = text.partition(" = ")
    described, _, below = described.partition(" < ")
    element, *dims = described.split()
    shape = (*rows, *map(int, dims))
    if value:
        return np.full(shape, int(value)).astype(element)
    if below:
        return random.integers(0, int(below), shape).astype(element)
    return random.standard_normal(shape).astype(element)
