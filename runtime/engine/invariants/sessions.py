"""Run a divided stage, and its invariant part only when what that reads was replaced."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from splitonnx.runtime.engine.invariants.divisions import GraphDivision


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What was computed, and weak references to what it was computed from."""

    sources: Sequence[weakref.ref[Any]]
    values: Mapping[str, Any]

    def is_of(self, sources: Sequence[Any]) -> bool:
        return all(kept() is source for kept, source in zip(self.sources, sources, strict=True))


class DividedSession:
    """A stage whose invariant part is kept between runs, with the methods of a session.

    Tensors are compared by identity, so whoever replaces an input must hand in another object, as
    an executor does.  What is kept is freed as soon as an input that it was computed from is.
    Several threads may run the stage at the same time.  ``reads`` are the inputs that the invariant
    part is computed from.
    """

    def __init__(self, division: GraphDivision, invariant: Any, rest: Any) -> None:
        self.reads, self._handed = division.reads, division.handed
        self._invariant = invariant
        self._rest = rest
        self._kept: _Kept | None = None

    def get_outputs(self) -> Sequence[Any]:
        """Return the stage's outputs in order, each with its name."""
        outputs: Sequence[Any] = self._rest.get_outputs()
        return outputs

    def run_with_ort_values(
        self, names: Sequence[str], feeds: Mapping[str, Any], options: Any
    ) -> list[Any]:
        """Run the stage and return the outputs ``names``.

        Raises:
            ValueError: an input is missing.
        """
        if missing := [name for name in self.reads if name not in feeds]:
            raise ValueError(f"input '{missing[0]}' is missing")
        values = self._find([feeds[name] for name in self.reads], options)
        made: list[Any] = self._rest.run_with_ort_values(names, {**feeds, **values}, options)
        return made

    def renew(self, feeds: Mapping[str, Any], options: Any) -> None:
        """Compute the invariant part now, for the inputs ``reads`` of the next run."""
        self._find([feeds[name] for name in self.reads], options)

    def _find(self, sources: Sequence[Any], options: Any) -> Mapping[str, Any]:
        kept = self._kept
        if kept is not None and kept.is_of(sources):
            return kept.values
        self._kept = None  # before there is more: both at once would be twice the memory
        feeds = dict(zip(self.reads, sources, strict=True))
        made = self._invariant.run_with_ort_values(self._handed, feeds, options)
        values = dict(zip(self._handed, made, strict=True))
        references = [weakref.ref(source, self._forget) for source in sources]
        self._kept = _Kept(sources=references, values=values)
        return values

    def _forget(self, source: weakref.ref[Any]) -> None:
        kept = self._kept
        if kept is not None and any(source is own for own in kept.sources):
            self._kept = None
