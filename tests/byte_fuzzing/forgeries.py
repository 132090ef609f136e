"""Headers and tasks that are well-formed but for the places where a fuzzer's bytes make them lie.

Each byte of an input makes one choice, honest more often than not, so that a lie is reached in
which all else is right.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from splitonnx.manifests import PartyManifest, Wire
from splitonnx.tensors import DTYPES

_Item = TypeVar("_Item")

_MOST_BYTES = 1 << 12
"""Of an honest tensor's data."""
_ODD_NAMES = ("t0", "", "__metadata__", "\\ud800", "a\\nb", "ä" * 40)
_ODD_DTYPES = ('"F128"', '"f32"', "null", "7", '["F32"]', '"BF16"')
_DIMS = ("1", "2", "3", "1", "2", "0", "4", "7")
_ODD_DIMS = (
    str(2**31), str(2**32), str(2**61), str(2**62), str(2**63 - 1), str(2**63), "9" * 40, "-1",
    "1.0", "true", '"N"', "null", "1e9", "NaN", "[]", "-0",
)  # fmt: skip
_SHIFTS = (0,) * 8 + (1, -1, 4, -4, 2**62, -(2**62), 2**63, 10**20)
_VALUES = (0.0, 1.0, 2.0, -0.5)
_ODD_VALUES = (1e30, -1.0, 9.0, math.inf, math.nan)
_COUNTS = ("0", "1", "2", str(2**63 - 1), str(2**63), "-1", "9" * 4300, "0.5", "null", '"1"')
_TEXTS = ('"train"', '"predict"', '"evaluate"', '"nonsense"', '""', '"\\u0000"', "1", '"\\ud800"')
_MOVES = ("Hello", "Welcome", "Tensors", "Save", "Saved", "Unsaved", "Fault", "Bye", "Login", "X")


class Choices:
    """An input's bytes, one for each choice; the first of a row where they are over."""

    def __init__(self, content: bytes) -> None:
        self._bytes = iter(content)

    def pick(self, items: Sequence[_Item]) -> _Item:
        """Pick one of the items."""
        return items[next(self._bytes, 0) % len(items)]

    def lie(self, honest: _Item, others: Sequence[_Item]) -> _Item:
        """Pick ``honest`` in most cases, else one of the others."""
        byte = next(self._bytes, 0)
        return honest if byte < 224 else others[byte % len(others)]


def forge_tensors(content: bytes) -> bytes:
    """Make a tensor message."""
    choices = Choices(content)
    entries, data = [], b""
    for index in range(choices.pick(range(1, 5))):
        name = choices.lie(f"t{index}", _ODD_NAMES)
        dtype = choices.pick(tuple(DTYPES))
        dims = [choices.lie(choices.pick(_DIMS), _ODD_DIMS) for _ in range(choices.pick(range(4)))]
        size = _measure(dims, DTYPES[dtype].itemsize)
        start = len(data) + choices.lie(0, _SHIFTS)
        place = [start, start + size + choices.lie(0, _SHIFTS)]
        written = choices.lie(f'"{dtype}"', _ODD_DTYPES)
        fields = [f'"dtype":{written}', f'"shape":[{",".join(dims)}]', f'"data_offsets":{place}']
        fields += choices.lie([], [['"more":1'], fields[:1], fields[1:2]])
        entries.append(f'"{name}":{{{",".join(fields)}}}')
        data += bytes([choices.pick((0, 1, 2, 255))]) * size
    entries += choices.lie([], [['"__metadata__":{"k":"v"}'], ['"__metadata__":{"k":1}']])
    return _join(entries, choices.lie(data, (data + b"\0", data[:-1], b"")))


def forge_message(content: bytes, manifest: PartyManifest, wires: str, peer: str) -> bytes:
    """Make a message as ``peer`` would send it, in most cases one with tensors of a task.

    ``wires`` is the JSON of all that the manifest lets travel.
    """
    choices = Choices(content)
    kind = choices.lie("Tensors", _MOVES)
    phase = choices.lie('"train"', _TEXTS)
    fields = {
        "type": f'"{kind}"',
        "session": choices.lie(f'"{"0" * 32}"', _TEXTS),
        "phase": phase,
        "digest": choices.lie(json.dumps(manifest.digest), _TEXTS),
        "wires": choices.lie(wires, ("{}", "[]", '{"train":[]}')),
        "protocol": choices.lie("2", _COUNTS),
        "learning_rate": choices.lie("0.1", ("1e999", "-1", "0", "1e-400", '"0.1"', "1e308")),
        **{name: choices.lie("0", _COUNTS) for name in ("step", "micro_batch", "turn", "seed")},
        **{name: choices.lie('"x"', _TEXTS) for name in ("code", "reason", "token", "origin")},
    }
    dropped = choices.lie("", tuple(fields))
    text = ",".join(f'"{name}":{value}' for name, value in fields.items() if name != dropped)
    metadata = f'"__metadata__":{{"splitonnx":{json.dumps("{" + text + "}")}}}'
    if kind != "Tensors":
        return _join([metadata], b"")
    sent = [
        wire
        for spoken in manifest.phases
        if f'"{spoken.name}"' == phase
        for wire in spoken.wires
        if wire.sender == peer or choices.lie(False, (True,))
    ]
    tensors = list(_forge_wires(choices, sent))
    return _join([metadata, *(entry for entry, _ in tensors)], b"".join(d for _, d in tensors))


def _forge_wires(choices: Choices, wires: Sequence[Wire]) -> Iterator[tuple[str, bytes]]:
    end = 0
    for wire in wires:
        if choices.lie(False, (True,)):
            continue
        batch = choices.pick((2, 2, 2, 1, 0, 3))
        shape = [dim if isinstance(dim, int) else batch for dim in wire.tensor.shape]
        shape = choices.lie(shape, ([*shape, 1], shape[:-1], [0, *shape], [1] * 33))
        dtype = choices.lie(wire.tensor.dtype, tuple(DTYPES))
        with np.errstate(all="ignore"):
            value = choices.lie(choices.pick(_VALUES), _ODD_VALUES)
            array = np.full(shape, value).astype(DTYPES[dtype])
        place = [end, end + array.nbytes]
        end = place[1]
        entry = {"dtype": dtype, "shape": shape, "data_offsets": place}
        yield f"{json.dumps(wire.tensor.name)}:{json.dumps(entry)}", array.tobytes()


def _measure(dims: Sequence[str], width: int) -> int:
    """Give the bytes of a tensor, or none where it lies."""
    if not all(dim.isdecimal() for dim in dims):
        return 0
    size = math.prod(map(int, dims)) * width
    return size if size <= _MOST_BYTES else 0


def _join(entries: Sequence[str], data: bytes) -> bytes:
    header = f"{{{','.join(entries)}}}".encode()
    return struct.pack("<Q", len(header)) + header + data
