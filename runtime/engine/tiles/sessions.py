"""Run a stage's elementwise parts over tiles that stay in cache, and the rest as usual.

An update of a parameter by Adam consists of 14 operators.  Over a whole large parameter, each of
them reads its inputs from memory and writes its result there.  Over a tile, only the first reads
and the last writes go to memory.  Tiles are bound in place: nothing is copied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from splitonnx.cores import count_cores
from splitonnx.runtime.engine.early.halves import divide as halve
from splitonnx.runtime.engine.invariants.divisions import divide
from splitonnx.runtime.engine.invariants.sessions import DividedSession
from splitonnx.runtime.engine.layouts.block_sizes import find_block_size
from splitonnx.runtime.engine.layouts.convolutions import block_placed
from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph
from splitonnx.runtime.engine.parallel.sessions import open_parallel
from splitonnx.runtime.engine.parallel.shared_work import share_work
from splitonnx.runtime.engine.tiles.buffers import BufferPool
from splitonnx.runtime.engine.tiles.feeds import check_feed, read_scalar
from splitonnx.runtime.engine.tiles.programs import (
    list_rest,
    name_array,
    name_output,
    name_scalar,
    write_program,
    write_rest,
)
from splitonnx.runtime.engine.tiles.regions import (
    Region,
    find_regions,
    find_replaced,
)
from splitonnx.runtime.engine.tiles.renamings import RenamedSession, find_sources

TILE = 1 << 17
"""Most elements of a tile.

Measured with 2 MiB of cache for a core: half of it costs more calls than it saves memory traffic.
"""
_STEP = 16
"""Tiles begin at multiples of this many elements, so that none shares a line of the cache."""
_WIDTH = 4


class _Open(Protocol):
    def __call__(self, graph: bytes, threads: int | None = None) -> Any:
        """Open a graph in ONNX Runtime, with a number of threads of its own if one is given."""


def open_arranged(
    content: bytes,
    runtime: Any,
    open_graph: _Open,
    steady: Collection[str],
    sums: Mapping[str, str],
    *,
    threads: int | None,
    keeps: bool,
    early: Collection[str] = (),
) -> Any:
    """Open a stage graph that has passed the gate, in the form that runs fastest on the CPU.

    Convolutions run on blocked images; large elementwise parts of other graphs run over tiles, on
    ``threads`` threads (``None``: one for each core).  ``runtime`` is the onnxruntime module.
    With ``keeps``, memory of outputs that were freed is used again.  What depends on the inputs
    ``steady`` alone is kept between runs.  ``sums`` maps inputs that a run may change to the
    outputs that take their place, which may be written to the same memory.  What outputs ``early``
    do not need may run later (:mod:`halves`), and gradients of weights run beside the rest, with
    several threads (:mod:`parallel`).
    """
    graph = PlacedGraph(content)
    if sources := find_sources(graph):
        return RenamedSession(graph, sources)
    blocked = block_placed(graph, find_block_size(runtime, arena=keeps))
    regions = find_regions(graph) if blocked is content else ()
    if not regions:
        open_whole = partial(open_parallel, open_graph, threads or count_cores())
        open_here = partial(_open_steady, open_whole, steady)
        halves = halve(PlacedGraph(blocked), early) if early else None
        return open_here(blocked) if halves is None else halves.open(open_here)
    rest = list_rest(graph, regions)
    replaced = [find_replaced(graph, region, sums) for region in regions]
    zeros = {name for outputs in replaced for name in outputs.values()}
    programs = [write_program(graph, region) for region in regions]
    opened = {program: open_graph(program, threads=1) for program in dict.fromkeys(programs)}
    return TiledSession(
        runtime,
        graph.outputs,
        _Rest(outputs=rest, session=open_graph(write_rest(graph, regions, zeros)))
        if rest
        else None,
        [
            _Part(index=index, region=region, session=opened[program], replaced=replaced[index])
            for index, (region, program) in enumerate(zip(regions, programs, strict=True))
        ],
        threads=threads or count_cores(),
        keeps=keeps,
    )


def _open_steady(
    open_graph: Callable[[bytes], Any], steady: Collection[str], content: bytes
) -> Any:
    """Open a graph; what depends on the inputs ``steady`` alone is kept between runs."""
    division = divide(PlacedGraph(content), steady) if steady else None
    if division is None:
        return open_graph(content)
    return DividedSession(division, open_graph(division.invariant), open_graph(division.rest))


@dataclass(frozen=True, kw_only=True)
class _Rest:
    outputs: tuple[str, ...]
    session: Any


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A region; ``replaced`` maps outputs of it to the inputs whose memory they take."""

    index: int
    region: Region
    session: Any
    replaced: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Output:
    name: str


@dataclass(frozen=True, kw_only=True)
class _Addresses:
    """Where the tensors of a part lie in one run.

    ``owners`` keep that memory alive, also if a second Ctrl-C ends the wait for the other threads.
    Each of ``arrays`` has an address and the bytes from an element to the next: 0 if all tiles read
    the same zeros.
    """

    owners: object
    arrays: Sequence[tuple[int, int]]
    scalars: Sequence[int]
    outputs: Sequence[int]


_Tile = tuple[_Part, int, int]


class TiledSession:
    """A stage that runs partly over tiles, with the methods of ONNX Runtime's sessions.

    The inputs ``zeros`` may be left out, and are zero then.  Otherwise a run changes them: the new
    sum is written over the old one.
    """

    def __init__(
        self,
        runtime: Any,
        outputs: Sequence[str],
        rest: _Rest | None,
        parts: Sequence[_Part],
        *,
        threads: int,
        keeps: bool,
    ) -> None:
        self._runtime = runtime
        self._outputs = [_Output(name=name) for name in outputs]
        self._rest = rest
        self._parts = parts
        self._threads = threads
        self._tiles = [tile for part in parts for tile in _divide(part)]
        self._scalars = {name for part in parts for name in part.region.scalars}
        self.zeros = frozenset(name for part in parts for name in part.replaced.values())
        longest = max(stop - start for _, start, stop in self._tiles) if self.zeros else 0
        self._zero_tile = np.zeros(longest, np.float32)
        shapes = (part.region.shape for part in parts for _ in part.region.outputs)
        self._pool = BufferPool(shapes, keeps=keeps)

    def get_outputs(self) -> Sequence[_Output]:
        """Return the stage's outputs in order, each with its name."""
        return self._outputs

    def run_with_ort_values(
        self, names: Sequence[str], feeds: Mapping[str, Any], options: Any
    ) -> list[Any]:
        """Run the stage and return the outputs ``names``.

        ``options`` are ONNX Runtime's run options: if they say so, the run ends after a tile.

        Raises:
            ValueError: an input is missing, or does not have the shape that the graph declares.
        """
        absent = self.zeros - feeds.keys()
        for part in self._parts:
            for name in part.region.arrays:
                if name not in absent:
                    check_feed(name, feeds, part.region.shape)
        known = {name: value for name, value in feeds.items() if name not in self.zeros}
        if self._rest is not None:
            made = self._rest.session.run_with_ort_values(self._rest.outputs, known, options)
            known |= zip(self._rest.outputs, made, strict=True)
        for part in self._parts:
            known |= {o: feeds[n] for o, n in part.replaced.items() if n not in absent}
        scalars = {name: read_scalar(name, known) for name in self._scalars}
        outputs = {
            name: self._pool.take(part.region.shape)
            for part in self._parts
            for name in part.region.outputs
            if name not in known
        }
        zeros = _find(self._zero_tile)
        places = [
            _Addresses(
                owners=(feeds, known, scalars, outputs, self._zero_tile),
                arrays=[
                    (zeros, 0) if name in absent else (feeds[name].data_ptr(), _WIDTH)
                    for name in part.region.arrays
                ],
                scalars=[_find(scalars[name]) for name in part.region.scalars],
                outputs=[
                    _find(outputs[name]) if name in outputs else known[name].data_ptr()
                    for name in part.region.outputs
                ],
            )
            for part in self._parts
        ]
        share_work(
            self._tiles,
            lambda tiles: _compute(tiles, places, options),
            threads=self._threads,
            name="splitonnx-tiles",
        )
        wrap = self._runtime.OrtValue.ortvalue_from_numpy
        return [wrap(outputs[name]) if name in outputs else known[name] for name in names]


def _divide(part: _Part) -> Iterator[_Tile]:
    """Yield a part's tiles: as few as possible, and about equally large."""
    size = math.prod(part.region.shape)
    count = -(-size // TILE)
    step = -(-size // count)
    step += -step % _STEP
    for start in range(0, size, step):
        yield part, start, min(start + step, size)


def _compute(tiles: Iterator[_Tile], places: Sequence[_Addresses], options: Any) -> None:
    bindings: dict[int, Any] = {}
    bound: dict[int, tuple[str, ...]] = {}  # the scalars that a session's binding has
    for part, start, stop in tiles:
        key, place = id(part.session), places[part.index]
        if key not in bindings:
            bindings[key] = part.session.io_binding()
        binding, size = bindings[key], (stop - start,)
        if bound.get(key) != part.region.scalars:
            bound[key] = part.region.scalars
            for index, address in enumerate(place.scalars):
                binding.bind_input(name_scalar(index), "cpu", 0, np.float32, (), address)
        for index, (address, width) in enumerate(place.arrays):
            at = address + start * width
            binding.bind_input(name_array(index), "cpu", 0, np.float32, size, at)
        for index, address in enumerate(place.outputs):
            at = address + start * _WIDTH
            binding.bind_output(name_output(index), "cpu", 0, np.float32, size, at)
        part.session.run_with_iobinding(binding, options)


def _find(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
