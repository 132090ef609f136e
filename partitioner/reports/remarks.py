"""Remarks on a model: what was found, which tensors it affects, and which options help."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from splitonnx.errors import count_some

_FEW = 4
"""The largest number of names that are all listed in a sentence."""


class Kind(StrEnum):
    """The topic of a remark."""

    NO_BATCHNORM = "no batchnorm"
    FROZEN_BATCHNORM = "frozen batchnorm"
    DROPOUT_OFF = "dropout off"
    QUANTIZED = "quantized"
    DEQUANTIZED = "dequantized"
    STORED_INTEGERS = "stored integers"
    UNTRAINED_INTEGERS = "untrained integers"
    SATURATION = "saturation"
    DICTIONARIES = "dictionaries"
    OPTIMIZED = "optimized"
    BATCH = "batch"
    CUTS_NOT_LISTED = "cuts not listed"
    INPUT_SCALING = "input scaling"
    SINGLE_NUMBERS = "single numbers"
    KEPT_CONSTANT = "kept constant"
    COMPUTED_TABLE = "computed table"
    FIXED_FILTER = "fixed filter"
    LOST_TIE = "lost tie"
    INITIAL_STATISTICS = "initial statistics"
    UNTRACKED_STATISTICS = "untracked statistics"
    LOST_DETACH = "lost detach"
    ACTIVATION_SKIPPED = "activation skipped"
    ACTIVATION_TWICE = "activation twice"
    CLASS_AXIS = "class axis"
    FIXED_BATCH = "fixed batch"
    COMPUTED_WEIGHTS = "computed weights"
    JOINED_PARAMETERS = "joined parameters"
    LOST_DROPOUT = "lost dropout"
    EXPORT_CALL = "export call"
    CONDITIONAL_WEIGHTS = "conditional weights"
    WITHOUT_GRADIENT = "without gradient"
    PRECISION = "precision"
    STORED_OPTIONS = "stored options"
    ADAPTERS = "adapters"
    STATE = "state"


@dataclass(frozen=True, kw_only=True)
class Remark:
    """A remark on a model: a sentence that may include advice on what to do.

    ``names`` lists the tensors or nodes that the remark is about.  ``options`` are options of
    ``cut`` that follow the advice, quoted for a shell.  Several options are either alternatives,
    such as two values of ``--class-axis``, or used together, such as two uses of ``--tie``.
    """

    kind: Kind
    sentence: str
    names: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def make_option(name: str, value: str) -> str:
    """Return an option and its value as one string, quoted for a shell if necessary."""
    return f"{name} {shlex.quote(value)}"


def list_names(names: Sequence[str]) -> str:
    """Return names as text for a sentence.

    If there are many names, the text contains only some of them, and the number of the others.
    """
    return count_some(names, _FEW)
