"""The server's metrics for Prometheus: sessions, steps, bytes, durations and refusals.

Only this module imports prometheus_client.  Each server has its own registry of metrics, so that
two servers in one process do not mix their metrics.  Labels have few values, such as phases and the
names of error classes.  They never contain a session's id, an owner or an address.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from splitonnx.names import PREDICT, TRAIN
from splitonnx.runtime.server.policies.tasks import RoundReport

Part = Literal["receive", "compute", "send", "checkpoint"]
"""Parts of a step on which a server spends time."""
Direction = Literal["up", "down"]
"""``up`` is from clients to the server, ``down`` from the server to clients."""
Outcome = Literal["saved", "failed"]
"""Outcome of writing a checkpoint."""

PARTS: tuple[Part, ...] = ("receive", "compute", "send", "checkpoint")
DIRECTIONS: tuple[Direction, ...] = ("up", "down")
OUTCOMES: tuple[Outcome, ...] = ("saved", "failed")
MAX_REASONS = 64
"""Most distinct reasons of refusals; any further reason is counted as ``other``."""
BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Upper bounds of the histogram buckets, in seconds."""


class Metrics:
    """The metrics of one server; safe to use from several threads.

    ``phases`` are the bundle's phases, such as ``train`` and ``predict``.  Labelled metrics are
    created in advance, so that counting takes only a dictionary lookup and an addition under a
    lock.
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
            self._checkpoints.labels(outcome)  # create the series with value 0
        self._rounds = Gauge(
            "splitonnx_rounds",
            "Rounds closed, clients that are members or wait for the others, shares that came late",
            ["what"],
            registry=registry,
        )
        self._worker_deaths = Counter(
            "splitonnx_worker_deaths", "Workers that ended unasked", registry=registry
        )
        self._refusals = Counter(
            "splitonnx_refusals", "What was refused, by reason", ["reason"], registry=registry
        )
        self._reasons: set[str] = set()

    def set_sessions(self, count: int) -> None:
        """Set the number of sessions in memory."""
        self._sessions.set(count)

    def set_rounds(self, report: RoundReport) -> None:
        """Set the numbers that describe the rounds."""
        self._rounds.labels("closed").set(report.closed)
        self._rounds.labels("members").set(report.members)
        self._rounds.labels("waiting").set(report.waiting)
        self._rounds.labels("late").set(report.late)

    def open_connection(self) -> None:
        """Count a connection that has finished its handshake."""
        self._connections.inc()

    def close_connection(self) -> None:
        """Count the end of a connection."""
        self._connections.dec()

    def count_step(self, phase: str) -> None:
        """Count a finished task; ``phase`` is one of the bundle's phases."""
        self._steps[phase].inc()

    def observe(self, part: Part, seconds: float) -> None:
        """Record how long a part of a step took; ``part`` is one of ``PARTS``."""
        self._seconds[part].observe(seconds)

    def count_bytes(self, direction: Direction, size: int) -> None:
        """Count the bytes of a message; ``"up"`` means from a client to the server."""
        self._bytes[direction].inc(size)

    def count_reconnect(self) -> None:
        """Count a connection that resumed a session."""
        self._reconnects.inc()

    def count_worker_death(self) -> None:
        """Count a worker process that ended unexpectedly."""
        self._worker_deaths.inc()

    def count_refusal(self, reason: str) -> None:
        """Count a refused request; ``reason`` is an error class's name or an HTTP ``Refusal``."""
        if reason not in self._reasons:
            if len(self._reasons) >= MAX_REASONS:
                reason = "other"
            self._reasons.add(reason)
        self._refusals.labels(reason).inc()

    def count_checkpoint(self, outcome: Outcome) -> None:
        """Count an attempt to write a checkpoint, whether it succeeded or failed."""
        self._checkpoints.labels(outcome).inc()

    def render(self) -> tuple[str, bytes]:
        """Return the content type and the text of all metrics in Prometheus format."""
        return CONTENT_TYPE_LATEST, generate_latest(self._registry)
