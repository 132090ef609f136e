"""How fast and how long one connection may talk."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from splitonnx.runtime.edge.rate_limits import Timers, TokenBucket


def test_who_keeps_to_the_rate_never_waits() -> None:
    bucket = TokenBucket(10, now=0.0)
    assert [bucket.count(1, now=0.1 * n) for n in range(1, 200)] == [0] * 199


def test_a_silence_earns_no_more_than_a_second_s_worth() -> None:
    bucket = TokenBucket(10, now=0.0)
    assert bucket.count(0, now=3600.0) == 0
    assert bucket.count(20, now=3600.0) == pytest.approx(1.0)


def test_each_event_beyond_the_rate_adds_to_the_wait() -> None:
    bucket = TokenBucket(2, now=0.0)
    assert [bucket.count(1, now=0.0) for _ in range(5)] == pytest.approx([0, 0, 0.5, 1.0, 1.5])


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose clock is turned by hand."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self.call_soon(self.stop)
        self.run_forever()


class Clocked:
    def __init__(self) -> None:
        self.loop = Loop()
        self.timers = Timers(self.loop)
        self.fired: list[str] = []

    def start(self, name: str, seconds: float, label: str = "") -> None:
        self.timers.start(name, seconds, lambda: self.fired.append(label or name))


@pytest.fixture
def clocked() -> Iterator[Clocked]:
    made = Clocked()
    yield made
    made.loop.close()


def test_a_timer_fires_once_when_its_time_is_over(clocked: Clocked) -> None:
    clocked.start("idle", 2.0)
    clocked.loop.advance(1.9)
    assert (clocked.fired, "idle" in clocked.timers) == ([], True)
    clocked.loop.advance(0.2)
    assert (clocked.fired, "idle" in clocked.timers) == (["idle"], False)
    clocked.loop.advance(10.0)
    assert clocked.fired == ["idle"]


def test_of_one_name_the_first_timer_stands(clocked: Clocked) -> None:
    """A client that sends byte after byte cannot push its deadline away."""
    clocked.start("message", 2.0, "first")
    clocked.loop.advance(1.5)
    clocked.start("message", 2.0, "second")
    clocked.loop.advance(0.6)
    assert clocked.fired == ["first"]
    clocked.start("message", 2.0, "third")
    clocked.loop.advance(2.1)
    assert clocked.fired == ["first", "third"]


def test_a_timer_that_was_stopped_does_not_fire(clocked: Clocked) -> None:
    clocked.start("idle", 1.0)
    clocked.start("login", 1.0)
    clocked.timers.stop("idle")
    clocked.timers.stop("idle")  # there is none any more
    clocked.loop.advance(2.0)
    assert clocked.fired == ["login"]


def test_all_timers_stop_at_once_even_from_within_one(clocked: Clocked) -> None:
    clocked.timers.start("first", 1.0, clocked.timers.stop_all)
    clocked.start("second", 2.0)
    clocked.start("third", 3.0)
    clocked.loop.advance(5.0)
    assert clocked.fired == []
    assert "third" not in clocked.timers


def test_a_pace_lets_a_second_s_worth_through_and_then_makes_wait() -> None:
    pace = TokenBucket(100, now=0.0)
    assert pace.count(100, now=0.0) == 0
    assert pace.count(50, now=0.0) == pytest.approx(0.5)
    assert pace.count(0, now=0.5) == 0
    assert pace.count(10, now=0.6) == pytest.approx(0.0, abs=1e-9)
    assert pace.count(150, now=1000.0) == pytest.approx(0.5)
