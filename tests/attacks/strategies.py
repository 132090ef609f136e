"""Random messages: what a client could send now, with some of it changed.

Hypothesis draws some bytes a message; they choose a line, then the message that would be right
there, then up to two changes of its fields and tensors.  So many are right, and lead on to where
others are wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st

LARGEST = 1 << 14
"""Elements of a tensor; more costs time and says no more."""
COUNTS = (0, 1, 2, 3, 7, 100, 2**31, 2**62, 2**63 - 1)
RATES = (0.0, 1e-3, 1.0, 1e-45, 3e38, -1.0, 1e39)
VALUES = (0.0, 1.0, -1.0, 1e-42, 1e30, 3e38, float("nan"), float("inf"), float("-inf"))
DTYPES = (np.float64, np.int64, np.int32, np.uint8)
PHASES = ("train", "predict", "evaluate", "", "tra\u0130n", "x" * 1000)
NAMES = ("0" * 32, "", "../../../etc/passwd", "A" * 32, "f" * 33)
OTHERS: Sequence[dict[str, Any]] = (
    {"type": "Bye"},
    {"type": "Login", "token": "x" * 43},
    {"type": "Fault", "code": "StaleConnection", "reason": "so it is", "newest": 3},
    {"type": "Saved", "session": "0" * 32, "step": 1},
    {"type": "Unsaved", "session": "0" * 32, "step": 1, "reason": "none"},
)

CHOICES = 32
"""Bytes drawn a message, of which each makes a choice."""

_Option = TypeVar("_Option")


class Dice:
    """Choices that were drawn before it is known between what."""

    def __init__(self, drawn: bytes) -> None:
        self._drawn = iter(drawn)

    def choose(self, options: Sequence[_Option]) -> _Option:
        """Choose one; the first where nothing is left of what was drawn."""
        return options[next(self._drawn, 0) % len(options)]

    def once_in(self, times: int) -> bool:
        """Say yes once in so many times."""
        return self.choose(range(times)) == times - 1


def draw_rounds(messages: int) -> st.SearchStrategy[list[bytes]]:
    """Draw what the choices of so many messages are made by."""
    one = st.binary(min_size=CHOICES, max_size=CHOICES)
    return st.lists(one, min_size=messages, max_size=messages)


@dataclass(kw_only=True)
class Sent:
    """A message, as a dictionary and its tensors."""

    facts: dict[str, Any]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    is_changed: bool = False

    def __str__(self) -> str:
        facts = {name: fact for name, fact in self.facts.items() if name != "wires"}
        shapes = {name: (str(a.dtype), a.shape) for name, a in self.tensors.items()}
        return f"{facts} {shapes}"


def draw_change(dice: Dice, sent: Sent, sessions: Sequence[str]) -> Sent:
    """Change something of a message."""
    facts, tensors = copy.copy(sent.facts), dict(sent.tensors)
    of_tensor = dice.once_in(2)
    if tensors and of_tensor:
        _change_tensor(dice, tensors)
        return Sent(facts=facts, tensors=tensors, is_changed=True)
    name = dice.choose([name for name in facts if name != "type"] or ["type"])
    facts[name] = _draw_value(dice, name, facts[name], sessions)
    return Sent(facts=facts, tensors=tensors, is_changed=True)


def _draw_value(dice: Dice, name: str, value: Any, sessions: Sequence[str]) -> Any:
    match name:
        case "session" | "origin":
            return dice.choose([*sessions, *NAMES])
        case "phase":
            return dice.choose(PHASES)
        case "learning_rate":
            return dice.choose(RATES)
        case "kept":
            return [dice.choose(COUNTS) for _ in range(dice.choose(range(4)))]
        case "is_open" | "can_repeat" | "publish":
            return dice.once_in(2)
        case "digest":
            return "0" * 64
        case "wires":
            return dice.choose([{}, {"train": []}, dict(reversed(value.items()))])
        case "step" | "turn" | "micro_batch" | "generation" | "start" if isinstance(value, int):
            return dice.choose((max(0, value - 1), value + 1, value + 2, *COUNTS))
        case "seed" | "newest":
            return dice.choose(COUNTS)
    return value


def _change_tensor(dice: Dice, tensors: dict[str, np.ndarray]) -> None:
    name = dice.choose(sorted(tensors))
    array = tensors[name]
    match dice.choose((*["shape"] * 6, "value", "value", "dtype", "name", "twice", "none")):
        case "shape":
            tensors[name] = np.full(_draw_shape(dice, array.shape), 1, array.dtype)
        case "value":
            tensors[name] = np.full(array.shape, dice.choose(VALUES), np.float32)
        case "dtype":
            tensors[name] = np.ones(array.shape, dice.choose(DTYPES))
        case "name":
            tensors[f"{name}?"] = tensors.pop(name)
        case "twice":
            tensors[f"{name}_grad"] = array
        case _:
            del tensors[name]


def _draw_shape(dice: Dice, shape: Sequence[int]) -> list[int]:
    """Change one dimension, or their number; what is too large becomes empty elsewhere."""
    sizes = list(shape)
    changed = not dice.once_in(6)
    if sizes and changed:
        axis = dice.choose(range(len(sizes)))
        size = sizes[axis]
        changes = (0, 1, max(0, size - 1), size + 1, 2 * size, 1 << 31)
        sizes[axis] = dice.choose(changes)
    elif dice.once_in(2):
        sizes.append(1)
    else:
        sizes = sizes[1:]
    if np.prod([float(size) for size in sizes]) > LARGEST:
        largest = sizes.index(max(sizes))
        sizes = [size if at == largest else 0 for at, size in enumerate(sizes)]
        sizes = sizes if len(sizes) > 1 else [LARGEST]
    return sizes
