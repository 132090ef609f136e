"""Ctrl-C counts, whatever becomes of its exception."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from splitonnx.interrupts import check_interrupt, note_interrupt, noting_interrupts
from tests.support.interrupts import lose_interrupt, taking_interrupts


@pytest.fixture(autouse=True)
def _taking() -> Iterator[None]:
    with taking_interrupts():
        yield


def test_an_interrupt_whose_exception_was_discarded_is_raised_at_the_next_check() -> None:
    with noting_interrupts():
        check_interrupt()
        lose_interrupt()
        for _ in range(2):  # the first check may have been discarded as well
            with pytest.raises(KeyboardInterrupt):
                check_interrupt()


def test_an_interrupt_is_raised_at_once_where_nothing_discards_it() -> None:
    with noting_interrupts(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


class Dying:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_that_python_discards_is_not_reported_but_raised_at_the_next_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    with noting_interrupts():
        Dying()
        with pytest.raises(KeyboardInterrupt):
            check_interrupt()
    assert sys.unraisablehook is sys.__unraisablehook__
    assert capsys.readouterr().err == ""


def test_a_second_interrupt_is_raised_as_the_first_one_was() -> None:
    with noting_interrupts():
        lose_interrupt()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_was_noted_ends_with_the_block() -> None:
    with noting_interrupts():
        lose_interrupt()
    check_interrupt()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with noting_interrupts():
        check_interrupt()


def test_a_program_s_own_handler_stays() -> None:
    taken = []

    def take(number: int, frame: FrameType | None) -> None:
        taken.append(number)

    for handler in (signal.SIG_IGN, take):
        signal.signal(signal.SIGINT, handler)
        with noting_interrupts():
            assert signal.getsignal(signal.SIGINT) is handler
            signal.raise_signal(signal.SIGINT)
            check_interrupt()
        assert signal.getsignal(signal.SIGINT) is handler
    assert taken == [signal.SIGINT]


def test_other_threads_are_not_interrupted() -> None:
    handlers, ended = [], []

    def work() -> None:
        check_interrupt()
        with noting_interrupts():  # only the main thread may set handlers
            handlers.append(signal.getsignal(signal.SIGINT))
        ended.append(True)

    with noting_interrupts():
        lose_interrupt()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        with pytest.raises(KeyboardInterrupt):
            check_interrupt()
    assert handlers == [note_interrupt]
    assert ended == [True]
