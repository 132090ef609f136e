"""The order in which a client runs the pieces of a step's micro-batches, as data with a text form.

A *piece* of a task is what a client can run between two replies: in the first one it computes what
it sends, in the last one its gradients.  While a micro-batch is at the server, the client can run
pieces of others, so both compute at once.  The order never changes a result (see
:mod:`splitonnx.runtime.engine.steps`).  The order made here is known as one-forward-one-backward,
from the paper PipeDream (arXiv 1806.03377), with a bounded number of micro-batches in flight.  This
module runs nothing.  ``runtime/js/src/pipelines.ts`` is the twin.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from splitonnx.errors import UsageError
from splitonnx.manifests import Phase, Source
from splitonnx.micro_batches import MOST_IN_FLIGHT

USUAL_IN_FLIGHT = 3
"""Tasks of a step that are unfinished at a time: one at each side, and one on its way."""


@dataclass(frozen=True, kw_only=True)
class StepDivision:
    """How a step's batch is divided: into ``count`` micro-batches, one after the other or not.

    At most ``in_flight`` of them are unfinished at a time.
    """

    count: int = 1
    in_flight: int = 1


def choose_division(accumulate: int, micro_batches: int, in_flight: int) -> StepDivision:
    """Return the division that a user asked for by one of two numbers of micro-batches.

    Raises:
        UsageError: a number is out of range, or both ``accumulate`` and ``micro_batches`` are set.
    """
    for name, number in (("accumulate", accumulate), ("micro_batches", micro_batches)):
        if number < 1:
            raise UsageError(f"{name} must be at least 1, not {number}")
    if not 1 <= in_flight <= MOST_IN_FLIGHT:
        raise UsageError(f"in_flight must be from 1 to {MOST_IN_FLIGHT}, not {in_flight}")
    if accumulate > 1 and micro_batches > 1:
        raise UsageError(
            "accumulate (--accumulate) runs micro-batches one after the other, and micro_batches "
            "(--micro-batches) several at a time; give one of them"
        )
    if accumulate > 1:
        return StepDivision(count=accumulate)
    return StepDivision(count=micro_batches, in_flight=in_flight if micro_batches > 1 else 1)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """One piece of one task of a step; ``task`` counts the micro-batches, and the update is last.

    In text, ``F3`` is the first piece of micro-batch 3, ``B3`` its last one, and ``T3`` a piece
    between them (``T1.3`` and ``T2.3`` if there are several).  ``U`` begins the update, and ``E``
    ends it, and so the step, if the server has to confirm it.
    """

    task: int
    piece: int
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class PipelineSchedule:
    """The operations of a step, in order."""

    operations: tuple[Operation, ...]

    def __str__(self) -> str:
        return " ".join(map(str, self.operations))


def make_schedule(
    pieces: int,
    micro_batches: int,
    in_flight: int,
    *,
    update_pieces: int = 2,
    is_update_early: bool = True,
) -> PipelineSchedule:
    """Make the schedule of a step in which at most ``in_flight`` tasks are unfinished at a time.

    A task begins as soon as that permits it; the update, when all messages of micro-batches were
    sent.  Otherwise, the next piece runs of the task whose message was sent first, as the server
    answers in that order.  ``pieces`` is the number of a
    micro-batch's pieces, and ``update_pieces`` that of the update's: 1 without a server.
    ``is_update_early`` means that the server can be asked for the update while the client still
    computes gradients, as it needs nothing of them.
    """
    operations: list[Operation] = []
    waiting: deque[tuple[int, int]] = deque()  # the pieces that come next, by their task
    begun = 0
    while begun <= micro_batches or waiting:
        may_begin = begun < micro_batches or (
            all(piece == pieces - 1 for _, piece in waiting) if is_update_early else not waiting
        )
        if begun <= micro_batches and len(waiting) < in_flight and may_begin:
            task, piece = begun, 0
            begun += 1
        else:
            task, piece = waiting.popleft()
        is_update = task == micro_batches
        count = update_pieces if is_update else pieces
        name = _name(piece, count, task)
        if is_update and piece in (0, count - 1):
            name = "E" if piece else "U"
        operations.append(Operation(task=task, piece=piece, name=name))
        if piece + 1 < count:
            waiting.append((task, piece + 1))
    return PipelineSchedule(operations=tuple(operations))


def list_pieces(phase: Phase, party: str) -> tuple[frozenset[str], ...]:
    """Return, for each piece of a party's tasks of a phase, the received wires that it needs.

    The first piece needs none.  What no stage needs, such as the loss, is needed to end a task, and
    so by the last piece.
    """
    received = frozenset(wire.tensor.name for wire in phase.wires if wire.receiver == party)
    behind: dict[str, frozenset[str]] = {name: frozenset((name,)) for name in received}
    pieces = [frozenset[str]()]
    for stage in phase.stages:
        read = {item.name for item in stage.inputs if item.source is not Source.STATE}
        read.update(stage.awaited)
        needed = frozenset[str]().union(*(behind.get(name, frozenset()) for name in read))
        behind.update(dict.fromkeys(stage.outputs, needed))
        if not needed <= frozenset().union(*pieces):
            pieces.append(needed.difference(*pieces))
    if unread := received.difference(*pieces):
        if len(pieces) == 1:
            pieces.append(unread)
        else:
            pieces[-1] |= unread
    return tuple(pieces)


def sends_data_alone(phase: Phase, party: str) -> bool:
    """Return whether a party sends nothing in a phase that its stages compute."""
    data = {spec.name for spec in phase.data}
    return all(wire.tensor.name in data for wire in phase.wires if wire.sender == party)


def _name(piece: int, count: int, task: int) -> str:
    if piece == 0:
        return f"F{task}"
    if piece == count - 1:
        return f"B{task}"
    return f"T{task}" if count == 3 else f"T{piece}.{task}"
