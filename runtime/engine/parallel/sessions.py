"""Run a stage's trunk with all threads, and then its parts side by side, each with one.

ONNX Runtime releases the interpreter's lock while a session runs.  Its own parallel executor has
one pool of threads, whose waiting threads take time from those that work.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from splitonnx.runtime.engine.builds.installed import detach
from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph
from splitonnx.runtime.engine.parallel.divisions import (
    ParallelDivision,
    Piece,
    divide,
    write_part,
)
from splitonnx.runtime.engine.parallel.shared_work import share_work


class _Open(Protocol):
    def __call__(self, graph: bytes, threads: int | None = None) -> Any:
        """Open a graph in ONNX Runtime, with a number of threads of its own if one is given."""


@dataclass(frozen=True, kw_only=True)
class _Output:
    """An output that is an input, too: no piece makes it."""

    name: str
    type: str = ""


@dataclass(frozen=True, kw_only=True)
class _Opened:
    piece: Piece
    session: Any


def open_parallel(open_graph: _Open, threads: int, content: bytes) -> Any:
    """Open a graph so that ``threads`` threads have work.

    A graph that is not worth a division is opened whole.
    """
    division = divide(PlacedGraph(content)) if threads > 1 else None
    opened = None if division is None else _open_pieces(division, open_graph)
    if division is None or opened is None:
        return open_graph(content)
    return ParallelSession(division, opened, threads=threads)


def _open_pieces(division: ParallelDivision, open_graph: _Open) -> list[Any] | None:
    """Open the trunk and the parts; ``None`` if a part's inputs cannot be declared."""
    types: dict[str, str] = {}
    sessions: list[Any] = []
    for piece in _list_pieces(division):
        content = write_part(division.graph, piece, types)
        if content is None:
            return None
        sessions.append(open_graph(content, threads=None if piece is division.trunk else 1))
        types |= {output.name: output.type for output in sessions[-1].get_outputs()}
    return sessions


def _list_pieces(division: ParallelDivision) -> list[Piece]:
    return [*([division.trunk] if division.trunk else []), *division.parts]


class ParallelSession:
    """A stage whose parts run side by side, with the methods of ONNX Runtime's sessions.

    A run takes ``threads`` threads, one of which is the caller's.  ``sessions`` are those of the
    trunk, if there is one, and of the parts.  Several threads may run the stage at the same time.
    """

    def __init__(
        self, division: ParallelDivision, sessions: Sequence[Any], *, threads: int
    ) -> None:
        opened = [
            _Opened(piece=piece, session=session)
            for piece, session in zip(_list_pieces(division), sessions, strict=True)
        ]
        made = {output.name: output for own in sessions for output in own.get_outputs()}
        self._outputs = [made.get(n) or _Output(name=n) for n in division.graph.outputs]
        self._inputs = division.graph.inputs
        self._trunk = opened.pop(0) if division.trunk else None
        self._parts = opened
        self._threads = threads

    def get_outputs(self) -> Sequence[Any]:
        """Return the stage's outputs in order, each with its name and type."""
        return self._outputs

    def run_with_ort_values(
        self, names: Sequence[str], feeds: Mapping[str, Any], options: Any
    ) -> list[Any]:
        """Run the stage and return the outputs ``names``.

        ``options`` are ONNX Runtime's run options, with which the trunk and all parts run.  If a
        part fails, ``options.terminate`` is set, so that the others end.

        Raises:
            ValueError: an input is missing.
        """
        if missing := [name for name in self._inputs if name not in feeds]:
            raise ValueError(f"input '{missing[0]}' is missing")
        wanted = {*names}
        parts = [part for part in self._parts if not wanted.isdisjoint(part.piece.makes)]
        run = _Run(parts, names, feeds, options)
        if self._trunk is not None:
            run.compute(self._trunk)
        run.spread(parts, self._threads)
        return [run.values[name] for name in names]


class _Run:
    """One run of a stage, and its values.

    A value is let go of when the last part that reads it has ended.
    """

    def __init__(
        self,
        parts: Sequence[_Opened],
        names: Sequence[str],
        feeds: Mapping[str, Any],
        options: Any,
    ) -> None:
        self.values = dict(feeds)
        self._options = options
        self._uses = Counter(names)
        for part in parts:
            self._uses.update(part.piece.reads)
        self._changing = threading.Lock()

    def compute(self, opened: _Opened) -> None:
        """Run a piece, and keep what is needed of it."""
        wanted = [name for name in opened.piece.makes if self._uses[name]]
        if not wanted:
            return
        feeds = {name: self.values[name] for name in opened.piece.reads}
        made = opened.session.run_with_ort_values(wanted, feeds, self._options)
        with self._changing:
            self.values |= zip(wanted, map(detach, made), strict=True)

    def spread(self, parts: Sequence[_Opened], threads: int) -> None:
        """Have all threads take the next part again and again, until none is left."""

        def compute(left: Iterator[_Opened]) -> None:
            for part in left:
                self.compute(part)
                self._let_go(part.piece.reads)

        share_work(parts, compute, threads=threads, name="splitonnx-parts", stop=self._stop)

    def _stop(self) -> None:
        """Have the parts end that are running: the first one that failed is the cause."""
        self._options.terminate = True

    def _let_go(self, names: Sequence[str]) -> None:
        with self._changing:
            self._uses.subtract(names)
            for name in names:
                if not self._uses[name]:
                    del self.values[name]
