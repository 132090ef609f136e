"""What a server tells Prometheus: how many sessions, steps and bytes, how long, what was refused.

The only module that imports prometheus_client.  Each server has a registry of its own, so two in
one process do not mix.  Labels are few and bounded: phases of the bundle, names of error classes;
never a session's id, an owner or an address.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from splitonnx.names import PREDICT, TRAIN

Part = Literal["receive", "compute", "send", "checkpoint"]
"""What a server's time of a step is spent on."""
Direction = Literal["up", "down"]
"""Up: from clients to the server."""
Outcome = Literal["saved", "failed"]
"""Of a checkpoint."""

PARTS: tuple[Part, ...] = ("receive", "compute", "send", "checkpoint")
DIRECTIONS: tuple[Direction, ...] = ("up", "down")
OUTCOMES: tuple[Outcome, ...] = ("saved", "failed")
MAX_REASONS = 64
"""Different reasons of refusals that are told apart; what comes after them is ``other``."""
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Upper bounds of the histogram of seconds."""


class Metrics:
    """The metrics of one server; safe to use from several threads.

    ``phases`` are the bundle's, such as ``train`` and ``predict``.  Children of labels are made
    once, so that counting costs a lookup in a dictionary and an addition under a lock.
    """

    def __init__(self, phases: Iterable[str] = (TRAIN, PREDICT)) -> None:
        self._registry = registry = CollectorRegistry()
        self._sessions = Gauge("splitonnx_sessions", "Sessions in memory", registry=registry)
        self._connections = Gauge(
            "splitonnx_connections", "Connections past their handshake", registry=registry
        )
        steps = Counter("splitonnx_steps", "Tasks done, by phase", ["phase"], registry=registry)
        self._steps = {phase: steps.labels(phase) for phase in phases}
        seconds = Histogram(
            "splitonnx_step_seconds",
            "Seconds of a task's parts: waiting for its messages, computing, sending, writing",
            ["part"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._seconds = {part: seconds.labels(part) for part in PARTS}
        size = Counter(
            "splitonnx_bytes", "Bytes of messages, by direction", ["direction"], registry=registry
        )
        self._bytes = {direction: size.labels(direction) for direction in DIRECTIONS}
        self._reconnects = Counter(
            "splitonnx_reconnects", "Connections that took up a session again", registry=registry
        )
        self._checkpoints = Counter(
            "splitonnx_checkpoints", "Checkpoints, by outcome", ["outcome"], registry=registry
        )
        for outcome in OUTCOMES:
            self._checkpoints.labels(outcome)  # so that it is there, at 0
        self._worker_deaths = Counter(
            "splitonnx_worker_deaths", "Workers that ended unasked", registry=registry
        )
        self._refusals = Counter(
            "splitonnx_refusals", "What was refused, by reason", ["reason"], registry=registry
        )
        self._reasons: set[str] = set()

    def set_sessions(self, count: int) -> None:
        """Note how many sessions are in memory."""
        self._sessions.set(count)

    def open_connection(self) -> None:
        """Count a connection past its handshake."""
        self._connections.inc()

    def close_connection(self) -> None:
        """Count the end of one."""
        self._connections.dec()

    def count_step(self, phase: str) -> None:
        """Count a task that is done; ``phase`` is one of those given at the start."""
        self._steps[phase].inc()

    def observe(self, part: Part, seconds: float) -> None:
        """Note how long a part of a step took."""
        self._seconds[part].observe(seconds)

    def count_bytes(self, direction: Direction, size: int) -> None:
        """Count the bytes of a message."""
        self._bytes[direction].inc(size)

    def count_reconnect(self) -> None:
        """Count a connection that took up a session again."""
        self._reconnects.inc()

    def count_worker_death(self) -> None:
        """Count a worker that ended without being asked to."""
        self._worker_deaths.inc()

    def count_refusal(self, reason: str) -> None:
        """Count a refusal; ``reason`` is the name of an error's class or of a ``Refusal``."""
        if reason not in self._reasons:
            if len(self._reasons) >= MAX_REASONS:
                reason = "other"
            self._reasons.add(reason)
        self._refusals.labels(reason).inc()

    def count_checkpoint(self, outcome: Outcome) -> None:
        """Count a checkpoint that was written, or could not be."""
        self._checkpoints.labels(outcome).inc()

    def render(self) -> tuple[str, bytes]:
        """Write all metrics as Prometheus reads them: the content type and the text."""
        return CONTENT_TYPE_LATEST, generate_latest(self._registry)
