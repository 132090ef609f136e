"""A stage that does not end by itself is ended: by the limit, by Ctrl-C, by the process's stop."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest

from splitonnx.errors import StageStopped, StageTooSlow
from splitonnx.interrupts import noting_interrupts
from splitonnx.runtime.engine.engines import Engine, LoadedStage, Tensor
from splitonnx.runtime.engine.runs import Runs
from tests.runtime.engine.test_engines import ADD, graph
from tests.support.endless import loop_over
from tests.support.interrupts import lose_interrupt, taking_interrupts

ENDLESS = graph(*loop_over("x", "y"), inputs="x", outputs="y")


def load(engine: Engine, content: bytes = ENDLESS) -> tuple[LoadedStage, dict[str, Tensor]]:
    stage = engine.load("endless", content, training=True)
    return stage, {name: engine.from_array(np.zeros(1, np.float32)) for name in "xw"}


def test_a_stage_beyond_its_seconds_is_ended_and_the_next_one_runs() -> None:
    """On earlier versions it runs until the process is killed."""
    engine = Engine(threads=1, stage_seconds=0.05)
    stage, feeds = load(engine)
    for _ in range(2):
        with pytest.raises(StageTooSlow, match=r"'endless' .* longer than 0.05 s"):
            engine.run(stage, {"x": feeds["x"]})
    added = engine.load("add", ADD, training=True)
    assert engine.to_array(engine.run(added, feeds)["y"]) == [0]


def test_a_stage_within_its_seconds_is_left_alone() -> None:
    engine = Engine(threads=1, stage_seconds=600)
    stage, feeds = load(engine, ADD)
    assert engine.to_array(engine.run(stage, feeds)["y"]) == [0]


def test_an_engine_that_stops_ends_what_runs_and_runs_nothing_more() -> None:
    engine = Engine(threads=1)
    stage, feeds = load(engine)
    threading.Timer(0.05, engine.stop).start()
    for _ in range(2):  # the second one whether or not the first had begun
        with pytest.raises(StageStopped, match="the server stops"):
            engine.run(stage, {"x": feeds["x"]})


INTERRUPTED = """
import numpy as np
from splitonnx.runtime.engine.engines import Engine
from tests.runtime.engine.test_runs import load
engine = Engine(threads=1)
stage, feeds = load(engine)
try:
    print("begun", flush=True)
    engine.run(stage, {"x": feeds["x"]})
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of its own")
def test_ctrl_c_ends_a_stage_that_the_main_thread_runs() -> None:
    """On earlier versions nothing but SIGKILL does."""
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "begun\n"
            process.send_signal(signal.SIGINT)
            said, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    # it may come just before the stage begins, where Python itself raises it
    assert said == "interrupted\n"
    assert errors == ""


class Options:
    """Run options that are told to stop a run."""

    def __init__(self) -> None:
        self.told = threading.Event()

    @property
    def terminate(self) -> bool:
        return self.told.is_set()

    @terminate.setter
    def terminate(self, value: bool) -> None:
        assert value
        self.told.set()


@pytest.mark.parametrize("noting", [nullcontext(), noting_interrupts()], ids=["python", "command"])
def test_ctrl_c_asks_native_code_to_stop_in_a_command_too(
    noting: AbstractContextManager[None],
) -> None:
    runs, options = Runs(), Options()
    with taking_interrupts(), noting:
        run = runs.begin("stage", options)
        try:
            lose_interrupt()
            assert options.told.wait(30)
        finally:
            runs.finish(run)


FAILING = """
import numpy as np
from onnx import helper
from splitonnx.errors import StageFailed
from splitonnx.runtime.engine.engines import Engine
from tests.runtime.engine.test_engines import ADD
engine = Engine(threads=1)
stage = engine.load("add", ADD, training=True)
sizes = {"x": 2, "w": 3}
feeds = {name: engine.from_array(np.zeros(size, np.float32)) for name, size in sizes.items()}
try:
    engine.run(stage, feeds)
except StageFailed as error:
    print(error)
"""


def test_a_stage_that_fails_writes_nothing_beside_the_error() -> None:
    """On earlier versions ONNX Runtime writes lines of its own to stderr."""
    run = subprocess.run(
        [sys.executable, "-c", FAILING], capture_output=True, text=True, check=True
    )
    assert "stage 'add' failed" in run.stdout
    assert run.stderr == ""
