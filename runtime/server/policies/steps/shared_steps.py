"""The training steps of many clients on one model, which runs one step at a time.

A step is either that of one client, or a joint one: the batches of several clients form one batch.
A step of several micro-batches has the model from its first one to its update, one task after the
other; in a joint one, the clients' first micro-batches form one, then their second ones, and so on.
A step that waits for a message of its clients holds no thread.  This module does not know the
rounds, and is not thread-safe.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from splitonnx.errors import (
    RemoteProtocolError,
    SplitonnxError,
    StageStopped,
    StepEnded,
    WorkerLost,
)
from splitonnx.messages import TaskKey
from splitonnx.micro_batches import CONFIRMED, MICRO_BATCH_WEIGHT, MICRO_BATCHES
from splitonnx.names import ACCUMULATE, TRAIN, UPDATE
from splitonnx.runtime.server.policies.models import ServerModel
from splitonnx.runtime.server.policies.steps.joint_batches import BatchLayout, Tensors
from splitonnx.runtime.server.policies.steps.running_steps import RunningStep
from splitonnx.runtime.server.policies.tasks import Delivery, Task


class SharedSteps:
    """The steps that wait, and the one that has begun.

    With a ``layout``, all clients that a step waits for make one batch; without, each step is of
    one client, in the order in which they came.  ``quorum`` is how many clients are enough for a
    joint step after ``timeout`` seconds.  After this time, a step whose client does not continue is
    ended, and one of micro-batches, however many still come, if another step waits, or one of its
    clients with its update; ``None`` is to wait forever.  Times are of a monotonic clock.

    If a joint step fails, its clients make it one by one, so that only a client whose own tensors
    are the cause receives the error.
    """

    def __init__(
        self, *, layout: BatchLayout | None = None, quorum: int = 1, timeout: float | None = None
    ) -> None:
        self._layout = layout
        self._quorum = quorum
        self._timeout = timeout
        self._arrived: dict[TaskKey, deque[Task]] = {}  # messages that were not handled yet
        self._begun = 0.0  # when the first of those that wait came
        self._step: RunningStep | None = None
        self._due: deque[Delivery] = deque()  # what was not taken yet
        self._apart: frozenset[TaskKey] = frozenset()  # failed together, are made one by one
        self._rate: float | None = None  # of the newest joint step
        self._left_out: frozenset[str] = frozenset()

    @property
    def are_joint(self) -> bool:
        """Return whether a step is made of the batches of several clients."""
        return self._layout is not None

    def take_left_out(self) -> frozenset[str]:
        """Return, once, the sessions that joint steps did not wait for any longer."""
        left_out, self._left_out = self._left_out, frozenset()
        return left_out

    def add(self, task: Task, now: float) -> None:
        """Accept a message of a client's step.

        Raises:
            RemoteProtocolError: the client sends a tensor again before the first is used.
            StepEnded: the step that the message continues was ended.
        """
        step = self._step
        if task.turn > 0 and task.key not in self._arrived:
            if step is None or task.key not in step.keys:
                raise StepEnded(task.key.step)
        elif task.turn == 0 and _continues_step(task.key):
            if step is None or not step.includes(task.key):
                raise StepEnded(task.key.step)
            step.note(task.key, now)
        elif task.turn == 0 and not self._list_waiting():
            self._begun = now
        queue = self._arrived.setdefault(task.key, deque())
        for earlier in queue:
            if again := earlier.tensors.keys() & task.tensors.keys():
                raise RemoteProtocolError(f"it sent '{min(again)}' twice in a step")
        queue.append(task)

    def run(
        self,
        model: ServerModel,
        awaited: Collection[str],
        now: float,
        *,
        cause: TaskKey | None = None,
    ) -> Iterator[Delivery]:
        """Run what is ready, and yield each delivery as soon as it is.

        A joint step waits for the sessions ``awaited``.  If a step fails, its clients receive the
        error; the one whose message was the ``cause`` is last, as it asks for nothing after that.
        If the caller stops early, the others are yielded the next time.
        """
        while True:
            self._due = deque(
                sorted(self._due, key=lambda due: due.key == cause and due.error is not None)
            )
            while self._due:
                yield self._due.popleft()
            step = self._find_ready(awaited, now)
            if step is None:
                return
            yield from self._perform(model, step, now)

    def withdraw(self, model: ServerModel | None, key: TaskKey) -> None:
        """Abort a client's step; the other clients of a joint step have to repeat it."""
        self._forget(key.session)
        self._due = deque(due for due in self._due if due.key.session != key.session)
        step = self._step
        if step is not None and step.includes(key) and model is not None:
            self._end(model, step, StepEnded(step.lead.step), apart=key.session)

    def interrupt(self, model: ServerModel, error: SplitonnxError) -> None:
        """End every step, whether it has begun or waits, and remember the error for its client."""
        if self._step is not None:
            self._end(model, self._step, error)
        self._due += [
            Delivery(key=key, version=model.version, error=error) for key in self._arrived
        ]
        self._arrived.clear()

    def end_if_silent(self, model: ServerModel, now: float) -> tuple[str, ...]:
        """End the step if a client has not continued it in time; return the silent sessions.

        A step of micro-batches also ends if it has kept others waiting for as long.  If these are
        clients of a joint step that have sent all of theirs, those that have not are named, too.
        """
        step = self._step
        if step is None or self._timeout is None or now - step.begun < self._timeout:
            return ()
        silent = step.list_unfinished(now - self._timeout)
        if now - step.since >= self._timeout:
            silent += step.list_silent({k.session for k, tasks in self._arrived.items() if tasks})
        elif not silent and not (step.is_chain and self._list_waiting()):
            return ()
        self._end(model, step, StepEnded(step.lead.step))
        return tuple(dict.fromkeys(silent))

    def _find_ready(self, awaited: Collection[str], now: float) -> RunningStep | None:
        """Return the step whose messages are all there, beginning one if none has begun."""
        if self._step is None:
            keys = self._choose(awaited, now)
            if not keys:
                return None
            self._begun = now
            rate = self._arrived[keys[0]][0].learning_rate
            self._step = RunningStep(keys=keys, learning_rate=rate, begun=now, since=now)
        step = self._step
        if step.is_between:
            step.begin_next_task(self._arrived)
        is_ready = not step.is_between and all(self._arrived.get(key) for key in step.keys)
        return step if is_ready else None

    def _list_waiting(self) -> tuple[TaskKey, ...]:
        """Return the keys of the steps that have not begun, in the order in which they came."""
        begun = {} if self._step is None else self._step.newest
        return tuple(key for key in self._arrived if key.session not in begun)

    def _choose(self, awaited: Collection[str], now: float) -> tuple[TaskKey, ...]:
        waiting = self._list_waiting()
        if self._layout is None or not waiting:
            return waiting[:1]
        for key in waiting:
            if key in self._apart:
                return (key,)
        missing = frozenset(awaited) - {key.session for key in waiting}
        if missing:
            is_over = self._timeout is not None and now - self._begun >= self._timeout
            if not is_over or len(waiting) < min(self._quorum, len(awaited)):
                return ()
            self._left_out |= missing
        keys = self._refuse_rates(self._refuse_kinds(waiting))
        return tuple(sorted(keys, key=lambda key: _rank(self._arrived[key][0])))

    def _refuse_kinds(self, keys: Sequence[TaskKey]) -> list[TaskKey]:
        """Refuse the clients that send micro-batches if most others do not, or the reverse.

        If as many do as do not, those remain whose step is one task.
        """
        counts = Counter(key.phase for key in keys)
        common = max(counts, key=lambda phase: (counts[phase], phase == TRAIN))
        own, others = "micro-batches", "whole batches"
        if common != TRAIN:
            own, others = others, own
        for key in keys:
            if key.phase != common:
                self._refuse(
                    key,
                    f"it sends {own} and most other clients send {others}, and a joint step has "
                    "one kind; train all clients with accumulate or micro_batches (--accumulate, "
                    "--micro-batches), whose numbers may differ, or all without",
                )
        return [key for key in keys if key.phase == common]

    def _refuse_rates(self, keys: Sequence[TaskKey]) -> list[TaskKey]:
        """Refuse the clients whose learning rate most others do not have; return the others.

        If as many have one rate as another, that of the step before remains.
        """
        rates = {key: self._arrived[key][0].learning_rate for key in keys}
        counts = Counter(rates.values())
        self._rate = common = max(counts, key=lambda rate: (counts[rate], rate == self._rate))
        for key, rate in rates.items():
            if rate != common:
                self._refuse(
                    key,
                    f"its learning rate {rate:g} differs from that of most other clients, "
                    f"{common:g}, and a joint step has one",
                )
        return [key for key in keys if rates[key] == common]

    def _refuse(self, key: TaskKey, reason: str) -> None:
        """Leave a client out of the joint steps, and remember why."""
        del self._arrived[key]
        self._left_out |= {key.session}
        self._due.append(Delivery(key=key, version=0, error=RemoteProtocolError(reason)))

    def _perform(self, model: ServerModel, step: RunningStep, now: float) -> Iterator[Delivery]:
        """Run the stages for which the clients' messages have arrived."""
        tasks = [self._arrived[key].popleft() for key in step.keys]
        has_ended = False
        try:
            if step.turn == 0:
                self._begin(model, step, tasks)
            step.turn, step.since = step.turn + 1, now
            outputs = model.run(step.own, self._join(step, tasks))
            if self._layout is None:
                yield from self._answer_one(model, step, outputs)
            else:
                self._answer_all(model, step, list(outputs))
            has_ended = True
        except SplitonnxError as error:
            has_ended = True
            if len(step.newest) > 1 and not isinstance(error, (StageStopped, WorkerLost)):
                self._apart = step.firsts
                error = StepEnded(step.lead.step)
            self._end(model, step, error)
        finally:
            if not has_ended and self._step is step:  # a delivery could not be taken
                self._end(model, step, StepEnded(step.lead.step))

    def _begin(self, model: ServerModel, step: RunningStep, tasks: Sequence[Task]) -> None:
        """Begin the running task of a step on the model."""
        first = tasks[0]
        if self._layout is not None:
            step.check_rates(tasks)
            if step.lead.phase != UPDATE:
                step.rows = tuple(self._layout.count_rows(task.tensors) for task in tasks)
        model.begin(step.own, seed=first.seed, learning_rate=first.learning_rate)

    def _answer_one(
        self, model: ServerModel, step: RunningStep, outputs: Iterator[Tensors]
    ) -> Iterator[Delivery]:
        """Yield what the client waits for as soon as it is there."""
        key, turn = step.lead, step.turn - 1
        for tensors in outputs:
            yield Delivery(key=key, version=model.version, tensors=tensors, turn=turn)
        is_done = self._finish(model, step)
        yield Delivery(
            key=key, version=model.version, is_last=is_done, turn=turn, handled=step.turn
        )

    def _answer_all(self, model: ServerModel, step: RunningStep, outputs: list[Tensors]) -> None:
        """Remember what the clients wait for once all stages have run.

        A client whose session is not told of the end with the last tensors would go on before that,
        also if the step is of it alone: the thread may be that of another client.
        """
        parts, turn = [self._divide(step, tensors) for tensors in outputs], step.turn - 1
        is_done = self._finish(model, step)
        for place, key in enumerate(step.keys):
            own = [part[place] for part in parts]
            self._due += [
                Delivery(key=key, version=model.version, tensors=tensors, turn=turn)
                for tensors in own[:-1]
            ]
            last = own[-1] if own else {}
            self._due.append(
                Delivery(
                    key=key,
                    version=model.version,
                    tensors=last,
                    is_last=is_done,
                    turn=turn,
                    handled=step.turn,
                )
            )

    def _join(self, step: RunningStep, tasks: Sequence[Task]) -> Tensors:
        """Return the tensors of the model's task from those of the clients' tasks."""
        sent = [task.tensors for task in tasks]
        if self._layout is None:
            return sent[0]
        if any(tensors.keys() != sent[0].keys() for tensors in sent):
            raise RemoteProtocolError("the clients of a joint step send different tensors")
        if step.lead.phase == UPDATE:
            if sent[0].keys() != {MICRO_BATCHES}:
                raise RemoteProtocolError("it does not say how many micro-batches it updates after")
            step.weights.check_end(step.keys, [tensors[MICRO_BATCHES] for tensors in sent])
            return {MICRO_BATCHES: np.array(step.number, np.int64)}
        weight = {}
        if step.is_chain and MICRO_BATCH_WEIGHT in sent[0]:
            own = [tensors[MICRO_BATCH_WEIGHT] for tensors in sent]
            weight[MICRO_BATCH_WEIGHT] = step.weights.weigh(step.keys, step.rows, own)
        if len(sent) == 1:
            return {**sent[0], **weight}
        rowed = [
            {name: array for name, array in tensors.items() if name not in weight}
            for tensors in sent
        ]
        return {**self._layout.join(rowed, step.rows), **weight}

    def _divide(self, step: RunningStep, tensors: Tensors) -> list[dict[str, np.ndarray]]:
        assert self._layout is not None  # otherwise a step has one client
        if step.lead.phase == UPDATE:  # each is told its own number of micro-batches
            return [{CONFIRMED: np.array(key.micro_batch, np.int64)} for key in step.keys]
        return self._layout.split(tensors, step.rows)

    def _finish(self, model: ServerModel, step: RunningStep) -> bool:
        """End the running task if all its stages have run, and its step if it is the last one."""
        is_done = model.finish(step.own)
        if is_done and step.lead.phase == ACCUMULATE:
            for key in step.keys:
                self._arrived.pop(key, None)
            step.is_between = True
        elif is_done:
            self._close(step)
        return is_done

    def _close(self, step: RunningStep) -> None:
        self._step = None
        for session in step.newest:
            self._forget(session)

    def _forget(self, session: str) -> None:
        """Drop the messages of a session that were not handled."""
        for key in [key for key in self._arrived if key.session == session]:
            del self._arrived[key]

    def _end(
        self,
        model: ServerModel,
        step: RunningStep,
        error: SplitonnxError,
        apart: str = "",
    ) -> None:
        """Discard a step's changes, and remember the error for its clients.

        A client between two tasks has none to tell it of, and learns it with its next message.
        """
        model.abandon(step.own)
        self._close(step)
        self._due += [
            Delivery(key=key, version=model.version, error=error)
            for session, key in step.newest.items()
            if session != apart
        ]


def _continues_step(key: TaskKey) -> bool:
    """Return whether other tasks of a client's step come before a task."""
    return key.phase == UPDATE or (key.phase == ACCUMULATE and key.micro_batch > 0)


def _rank(task: Task) -> tuple[int, str]:
    """Return a key that orders clients by what they send, whatever their sessions are called.

    So a training that is repeated adds the same numbers in the same order.
    """
    checksum = 0
    for name in sorted(task.tensors):
        content = np.ascontiguousarray(task.tensors[name]).view(np.uint8)
        checksum = zlib.crc32(content.data, checksum)
    return checksum, task.key.session
