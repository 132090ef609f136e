"""The example's page in headless Chromium, as a user has it before them, and what it keeps.

Chromium is the system's; ``SPLITONNX_CHROMIUM`` names another.  As root it runs without its own
sandbox, which root cannot have.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from splitonnx.codecs import decode_tensors
from splitonnx.partitioner.partitions import cut

if TYPE_CHECKING:
    from playwright.sync_api import Browser, CDPSession, Page, Playwright

DIST = Path(__file__).parents[2] / "examples" / "browser" / "dist"
PATIENCE = 60_000
"""Milliseconds that something may take on a machine that is busy."""
PIXELS = 64
AT, TAIL_AT = "/block1/Relu_output_0", "/block3/MaxPool_1_output_0"
"""Where `make web` cuts the page's model."""

_READ_STORE = """async ([base, store]) => {
  const databases = await indexedDB.databases();
  if (!databases.some(({ name }) => name === base)) return [];
  const database = await new Promise((resolve, reject) => {
    const request = indexedDB.open(base);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  const items = database.transaction(store).objectStore(store);
  const ask = (request) => new Promise((resolve) => {
    request.onsuccess = () => resolve(request.result);
  });
  const [keys, values] = await Promise.all([ask(items.getAllKeys()), ask(items.getAll())]);
  database.close();
  const encode = (value) => value instanceof Uint8Array
    ? btoa(Array.from(value, (byte) => String.fromCharCode(byte)).join("")) : value;
  return keys.map((key, index) => [key, encode(values[index])]);
}"""


def cut_digits(folder: Path, *, tail_at: str | tuple[()] = TAIL_AT) -> Path:
    """Cut the page's model into ``folder/bundle``, U-shaped unless told otherwise."""
    model = Path(__file__).parents[2] / "examples" / "digits.onnx"
    cut(model, at=AT, tail_at=tail_at, client_target="portable").save(folder / "bundle")
    return folder / "bundle"


def find_chromium() -> str | None:
    """Find the program, if there is one."""
    names = (os.environ.get("SPLITONNX_CHROMIUM", ""), "chromium", "chromium-browser")
    return next((found for name in names if name and (found := shutil.which(name))), None)


@contextmanager
def running_chromium() -> Iterator[Browser]:
    """Run Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, launching_chromium(playwright) as browser:
        yield browser


@contextmanager
def launching_chromium(playwright: Playwright, *options: str) -> Iterator[Browser]:
    """Run Chromium without a window, with options of its command line."""
    arguments = ["--disable-dev-shm-usage", *options]  # which is small in containers
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")
    browser = playwright.chromium.launch(executable_path=find_chromium(), args=arguments)
    try:
        yield browser
    finally:
        browser.close()


@contextmanager
def tracing(devtools: CDPSession) -> Iterator[list[float]]:
    """Give, at the end, the processor time of each task of the page's thread, in milliseconds.

    It counts what a slowed processor adds, and not what the thread waits for a core.
    """
    events: list[dict[str, Any]] = []
    ended: list[object] = []
    tasks: list[float] = []
    devtools.on("Tracing.dataCollected", lambda part: events.extend(part["value"]))
    devtools.on("Tracing.tracingComplete", lambda end: ended.append(end))
    devtools.send("Tracing.start", {"traceConfig": {"includedCategories": ["toplevel"]}})
    yield tasks
    devtools.send("Tracing.end")
    while not ended:
        devtools.send("Runtime.evaluate", {"expression": "0"})  # hears events while it waits
    threads = {
        (event["pid"], event["tid"])
        for event in events
        if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    tasks += [
        event["tdur"] / 1000
        for event in events
        if event["name"] == "ThreadControllerImpl::RunTask"
        and (event["pid"], event["tid"]) in threads
        and "tdur" in event  # one that had not ended has none
    ]


class Screen:
    """The page, open in a window; ``problems`` are what its console complains of."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.problems: list[str] = []
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on(
            "console",
            lambda message: self.problems.append(message.text) if message.type == "error" else None,
        )
        page.goto(url.replace("ws", "http", 1))

    def wait_for_status(self, text: str | re.Pattern[str]) -> None:
        self.page.locator("#status").filter(has_text=text).wait_for()

    def start(self, *, passes: int) -> None:
        self.page.select_option("#epochs", str(passes))
        self.page.click("#start")

    def wait_for_step(self, least: int) -> None:
        """Wait until so many steps are made, and shown."""
        numbers = "|".join(str(number) for number in range(least, 1000))
        shown = self.page.locator("#steps").filter(has_text=re.compile(f"^({numbers})$"))
        shown.wait_for()

    def draw(self, *points: tuple[float, float]) -> None:
        """Draw a stroke on the pad; the points are shares of its sides."""
        box = self.page.locator("#pad").bounding_box()
        assert box is not None
        mouse = self.page.mouse
        for number, (x, y) in enumerate(points):
            mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=6)
            if not number:
                mouse.down()
        mouse.up()

    def losses(self) -> dict[int, float]:
        """Return the loss of each step, as the page keeps its curve."""
        return {step: mark["loss"] for step, mark in self._read_store("splitonnx-page", "marks")}

    def read_storage(self) -> dict[str, bytes]:
        """Return what the client keeps in IndexedDB, by name."""
        files = self._read_store("splitonnx", "files")
        return {name: base64.b64decode(content) for name, content in files}

    def _read_store(self, base: str, store: str) -> list[tuple[Any, Any]]:
        found: list[tuple[Any, Any]] = self.page.evaluate(_READ_STORE, [base, store])
        return found

    def read_state(self) -> dict[str, np.ndarray]:
        """Return the weights that training left in the browser."""
        (name,) = self.read_storage()
        assert name.endswith("/state")
        return decode_tensors(self.read_storage()[name], max_header=1 << 20)[0]


class Relay:
    """Passes connections on to a server's port while the context lasts, and cuts them when told."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Relay:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        _end(self._listener)
        self._threads[0].join()
        self.cut()
        for thread in self._threads:
            thread.join()
        for one in (self._listener, *self._sockets):
            one.close()

    def cut(self) -> None:
        """End every connection; new ones may come."""
        for one in self._sockets:
            _end(one)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._upstream))
            self._sockets += [client, server]
            for source, sink in ((client, server), (server, client)):
                thread = threading.Thread(target=_pass_on, args=(source, sink))
                self._threads.append(thread)
                thread.start()


def _end(one: socket.socket) -> None:
    with suppress(OSError):  # it has ended already
        one.shutdown(socket.SHUT_RDWR)


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while content := source.recv(1 << 16):
            sink.sendall(content)
    _end(sink)


def read_digits() -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the page's digits as a Python client takes them: to train on, and held out."""
    content = (DIST / "digits.bin").read_bytes()
    trained = int.from_bytes(content[:4], "little")
    rows = np.frombuffer(content, np.uint8, offset=8).reshape(-1, PIXELS + 1)
    images = (rows[:, :PIXELS].reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    labels = rows[:, PIXELS].astype(np.int64)
    return (
        {"image": images[:trained], "labels": labels[:trained]},
        {"image": images[trained:], "labels": labels[trained:]},
    )
