"""F4: messages that are as they should be, and cost the server, or others, too much."""

from __future__ import annotations

import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from tests.attacks.models import Cut, build_wide, cut_model, save
from tests.attacks.processes import MIB, Server, make_token
from tests.attacks.verdicts import Attack, Ground, Outcome
from tests.attacks.wires import Gone, Line, describe

FORWARD_MIB = 16
ROW_BYTES = 24 * 8 * 8 * 4
"""Of the quickstart's first wire."""
TASK_MIB = 512
"""The bound that the server is given on its tasks' memory, where it knows one."""
SLACK_MIB = 256
"""Beyond it: the message itself, its copies, and what the process grows by anyway."""
GREEDY_MIB = 6
STEPS, ROWS = 40, 8
ALONE = 5
"""Predictions that are timed alone."""
LINES = 6
"""Connections of each greedy owner."""
WINDOW_SECONDS = 5
LOAD_SECONDS = 300.0
"""Within which the 64 clients have begun and the windows are over."""
LOAD_TRIES = 3
LOAD = Path(__file__).parents[2] / "benchmarks" / "greedy_clients.py"
SLACK = 1.5
"""Times an honest client's step may take beyond what fair turns make it wait."""
DENORMAL = 1e-42
DENORMAL_ROWS = 64


def _cut_wide(ground: Ground) -> Cut:
    folder = ground.room()
    return cut_model(
        ground.checkout, save(build_wide(), folder), folder, "--at", "r1", "--tail-at", "r3"
    )


def large_forward(ground: Ground) -> Outcome:
    """Send 16 MiB of narrow rows, which become wide, in one forward message."""
    cut = _cut_wide(ground)
    option = ("--max-task-bytes", TASK_MIB * MIB)
    told = "none"
    with Server(ground.checkout, cut.server, option) as server:
        before = server.memory_mib()
        with Line(server.url, cut.client) as eve:
            eve.hello()
            (forward,) = eve.names("train", "client", "activation")
            waves = np.ones((FORWARD_MIB * MIB // 64, 16), np.float32)
            try:
                told = describe(eve.ask(eve.task(), {forward: waves})[0])
            except (Gone, TimeoutError) as gone:
                told = type(gone).__name__
        grown = server.memory_mib("VmHWM") - before
        death = server.death(0.5)
    return Outcome(
        seen=f"{grown:+,.0f} MiB; server: {death or 'lives'}; answer: {told}",
        held=death is None and grown < TASK_MIB + SLACK_MIB and told != "Gone",
    )


class Greedy(threading.Thread):
    """A client that asks for as large predictions as the server takes, one after the other."""

    def __init__(self, url: str, cut: Cut, token: str) -> None:
        super().__init__(daemon=True)
        self.answers: list[str] = []
        self.seconds: list[float] = []
        self.begun, self.ready, self.over = (threading.Event() for _ in range(3))
        self._place = (url, cut.client, token)
        self._rows = GREEDY_MIB * MIB // ROW_BYTES

    def run(self) -> None:
        while not self.over.is_set():
            with suppress(Gone, TimeoutError, OSError), Line(*self._place) as line:
                line.hello()
                (forward,) = line.names("predict", "client", "activation")
                waves = np.ones((self._rows, 24, 8, 8), np.float32)
                step = 0
                while not self.over.is_set():
                    self.begun.set()
                    task = line.task(phase="predict", micro_batch=step)
                    begun = time.perf_counter()
                    self.answers.append(describe(line.ask(task, {forward: waves})[0]))
                    self.seconds.append(time.perf_counter() - begun)
                    step += 1
                    if step == ALONE:
                        self.ready.set()


def _time_steps(line: Line, begin: int, value: float, rows: int) -> list[float]:
    """Train by hand, and give each step's seconds."""
    shapes = {
        wire["tensor"]["name"]: (rows, *wire["tensor"]["shape"][1:]) for wire in line.wires["train"]
    }
    seconds = []
    for step in range(begin, begin + STEPS):
        begun = time.perf_counter()
        for turn, kind in enumerate(("activation", "gradient")):
            (name,) = line.names("train", "client", kind)
            array = np.full(shapes[name], value, np.float32)
            answer, _ = line.ask(line.task(step=step, turn=turn), {name: array})
            if answer["type"] != "Tensors":
                raise Gone(describe(answer))
        seconds.append(time.perf_counter() - begun)
    return seconds


def greedy_predictions(ground: Ground) -> Outcome:
    """Let two owners ask for predictions of 6 MiB, each on six lines, while a third trains.

    With fair turns each of a step's two messages waits for one prediction of each greedy owner.
    """
    cut = ground.digits.copy(ground.room())
    tokens = cut.bundle.parent / "tokens"
    ana, eve, max_ = (make_token(ground.checkout, name, tokens) for name in ("ana", "eve", "max"))
    with (
        Server(ground.checkout, cut.server, ("--token-file", tokens)) as server,
        Line(server.url, cut.client, ana) as honest,
    ):
        honest.hello()
        _time_steps(honest, 0, 1.0, ROWS)
        alone = _time_steps(honest, STEPS, 1.0, ROWS)
        lone = Greedy(server.url, cut, eve)
        lone.start()
        lone.ready.wait(60)
        lone.over.set()
        lone.join(60)
        greedy = [Greedy(server.url, cut, token) for token in (eve, max_) for _ in range(LINES)]
        for one in greedy:
            one.start()
        for one in greedy:
            one.begun.wait(10)
        crowded = _time_steps(honest, 2 * STEPS, 1.0, ROWS)
        for one in greedy:
            one.over.set()
        for one in greedy:
            one.join(60)
    prediction = statistics.median(lone.seconds)
    step, among = statistics.median(alone), statistics.median(crowded)
    bound = SLACK * (step + 2 * 2 * prediction)
    told = sorted({answer for one in greedy for answer in one.answers})
    return Outcome(
        seen=f"median step {step * 1e3:.0f} ms alone, {among * 1e3:.0f} ms beside them, the "
        f"slowest {max(crowded):.2f} s; a prediction alone {prediction * 1e3:.0f} ms; bound "
        f"{bound * 1e3:.0f} ms; answers to the greedy: {', '.join(told) or 'none'}",
        held=among <= bound,
    )


def denormals(ground: Ground) -> Outcome:
    """Train on numbers that are nearly zero."""
    cut = _cut_wide(ground)
    medians = []
    with Server(ground.checkout, cut.server, ("--threads", 1)) as server:
        for value in (1.0, DENORMAL):
            with Line(server.url, cut.client) as line:
                line.hello()
                seconds = _time_steps(line, 0, value, DENORMAL_ROWS)
                medians.append(statistics.median(seconds[5:]))
    ratio = medians[1] / medians[0]
    return Outcome(
        seen=f"median step {medians[0] * 1e3:.1f} ms, of denormals {medians[1] * 1e3:.1f} ms "
        f"({ratio:.1f} times)",
        held=ratio < 2.0,
    )


def load(ground: Ground) -> Outcome:
    """Let 64 clients of 8 tokens work, of which two are greedy; the benchmark tells the medians.

    It is run again where one of its own processes fell, which those of 8f22c8c sometimes do.
    """
    for _ in range(LOAD_TRIES):
        code, printed = _run_load(ground)
        ratio = re.search(r"^([\d.]+|nan) times", printed, re.MULTILINE)
        if ratio is not None:
            break
    else:
        lines = printed.strip().splitlines() or ["nothing was printed"]
        return Outcome(seen=f"no figures: {lines[-1][:120]}", held=False)
    medians = re.findall(r"^(with|without) the greedy.* median (\d+|nan) ms", printed, re.MULTILINE)
    without, beside = (
        "/".join(median for name, median in medians if name == kind) for kind in ("without", "with")
    )
    return Outcome(
        seen=f"median step {without} ms without the greedy two, {beside} ms with them: "
        f"{ratio[1]} times",
        held=code == 0,
    )


def _run_load(ground: Ground) -> tuple[int | None, str]:
    with subprocess.Popen(
        [sys.executable, str(LOAD), "--seconds", str(WINDOW_SECONDS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ground.checkout.environment,
        cwd="/",
    ) as process:
        try:
            printed, _ = process.communicate(timeout=LOAD_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # for it to end its clients and its server
            process.communicate()
            return None, f"still running after {LOAD_SECONDS:.0f} s"
    return process.returncode, printed


ATTACKS = (
    Attack(
        fault="F4", name="a forward message of 16 MiB", run=large_forward,
        right=f"refused, or within its bound of {TASK_MIB} MiB (and {SLACK_MIB})",
    ),
    Attack(
        fault="F4", name="two owners, six predictions of 6 MiB each", run=greedy_predictions,
        right=f"at most {SLACK} times what fair turns cost another's step",
    ),
    Attack(
        fault="F4", name="64 clients of 8 tokens, two of them greedy", run=load,
        right="the others' median step at most 1.5 times as long",
    ),
    Attack(
        fault="F4", name="denormals", run=denormals,
        right="a step at most twice as long",
    ),
)  # fmt: skip
