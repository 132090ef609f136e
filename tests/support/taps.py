"""A phone under the finger: taps at a page whose processor is slowed, and how soon it answers.

Chromium slows a page's thread by keeping it on its core without work: at a quarter of the speed it
has a core busy for four fifths of the time even while the page does nothing.  A phone has other
cores for the worker that trains, and the server is elsewhere; on a machine of two cores, all of
these would take turns with the thread.  So the thread is given a core of its own here, where there
are two and Linux lets them be chosen.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from splitonnx import Server
from tests.support.browsers import DIST, Screen, running_chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SLOWDOWN = 4
"""How many times slower than this machine a phone is."""
QUICK = 16.0
"""Milliseconds below which the browser reports no event."""
TIMELY = 100.0
"""Milliseconds that a tap may take to be answered."""

_WATCH = """() => {
  window.taps = [];
  const watch = (list) => {
    for (const { name, target, duration } of list.getEntries()) {
      if (name === "click" && target?.closest("#labels")) window.taps.push(duration);
    }
  };
  new PerformanceObserver(watch).observe({ type: "event", durationThreshold: 16 });
}"""
_AWAIT_CLICK = """() => {
  window.answered = new Promise((resolve) => {
    const answer = () => requestAnimationFrame(() => setTimeout(resolve));
    addEventListener("click", answer, { once: true });
  });
}"""

_FIND_BUTTONS = """() => {
  const labels = document.getElementById("labels");
  labels.scrollIntoView({ block: "center" });
  return [...labels.children].map((button) => {
    const { x, y, width, height } = button.getBoundingClientRect();
    return { x: x + width / 2, y: y + height / 2 };
  });
}"""


@contextmanager
def sparing_a_core() -> Iterator[int | None]:
    """Keep what this thread starts meanwhile from one core, and give its number if there is one."""
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        yield None
        return
    cores = os.sched_getaffinity(0)
    spared = max(cores)
    os.sched_setaffinity(0, cores - {spared})
    try:
        yield spared
    finally:
        os.sched_setaffinity(0, cores)


@contextmanager
def holding_a_phone(bundle: Path, *, is_alone: bool) -> Iterator[tuple[Screen, Finger]]:
    """Open a phone in a browser of its own.

    Where its thread ``is_alone``, it has a core of its own, if there is one to spare.
    """
    with (
        sparing_a_core() if is_alone else nullcontext() as core,
        running_chromium() as browser,
        opening_a_phone(bundle, browser, core=core) as phone,
    ):
        yield phone


@contextmanager
def opening_a_phone(
    bundle: Path, browser: Browser, *, core: int | None = None
) -> Iterator[tuple[Screen, Finger]]:
    """Serve a bundle and open its page at a phone's size, ready to train, under a finger."""
    with (
        # one thread: the server of a phone does not take the phone's processor
        Server(bundle / "server", port=0, client=bundle / "client", web=DIST, threads=1) as server,
        browser.new_context(
            viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
        ) as context,
    ):
        screen = Screen(context.new_page(), server.url)
        screen.wait_for_status("Ready")
        yield screen, Finger(screen, browser, core=core)


class Finger:
    """Taps the digits' buttons of an open page, which is slowed from here on, and may not scroll.

    With a ``core`` the page's thread runs on that one alone.
    """

    def __init__(self, screen: Screen, browser: Browser, *, core: int | None) -> None:
        self._page = screen.page
        self.devtools = screen.page.context.new_cdp_session(screen.page)
        self._count = 0
        self._points = self._page.evaluate(_FIND_BUTTONS)
        if core is not None:
            # A process's first thread is its page's; others of the kind have no page, and rest.
            for renderer in _find_renderers(browser):
                os.sched_setaffinity(renderer, {core})
        self.devtools.send("Emulation.setCPUThrottlingRate", {"rate": SLOWDOWN})
        self._page.evaluate(_WATCH)

    def tap(self, digit: int) -> None:
        """Touch a digit's button for a moment, and wait for what the page does then."""
        self._page.evaluate(_AWAIT_CLICK)
        for kind, points in (("touchStart", [self._points[digit]]), ("touchEnd", [])):
            self.devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        self._page.evaluate("() => window.answered")
        self._count += 1

    def durations(self) -> list[float]:
        """Return the milliseconds from each tap to the picture of its answer, in eights."""
        reported: list[float] = self._page.evaluate("window.taps")
        return reported + [QUICK] * (self._count - len(reported))


def count_late(durations: Sequence[float]) -> int:
    """Count the taps whose answer was not timely."""
    return sum(milliseconds > TIMELY for milliseconds in durations)


def _find_renderers(browser: Browser) -> list[int]:
    session = browser.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    session.detach()
    return [process["id"] for process in processes if process["type"] == "renderer"]
