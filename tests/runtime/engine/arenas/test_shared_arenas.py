"""What the stages of a process share, each time in a process of its own.

A script prints numbers: how many MiB its resident memory grew by, now or at most.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

START = """
import gc
from pathlib import Path
import numpy as np
from splitonnx.runtime.engine.arenas.shared_arenas import open_arena
from splitonnx.runtime.engine.builds.installed import get_bindings, installed_runtime
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.layouts.messages import (
    write_model, write_node, write_opset, write_value,
)

MIB = 1 << 20

def read(line):
    status = Path("/proc/self/status").read_text()
    return int(status.split(line + ":")[1].split()[0]) // 1024

def load(engine, name):
    # two results of the input's size at the same time
    nodes = [write_node("Abs", ["x"], "a"), write_node("Neg", ["a"], "y")]
    fields = [("node", node) for node in nodes] + [("name", b"g")]
    fields += [("input", write_value("x", None)), ("output", write_value("y", None))]
    return engine.load(name, write_model(8, [write_opset("", 17)], fields), training=True)

def run(stage, size):
    values = np.broadcast_to(np.float32(3), (size * MIB // 4,))
    made = engine.run(stage, {"x": engine.from_array(values)})["y"]
    assert engine.to_array(made)[-1] == -3
    return made

engine = Engine(threads=1)
first, second = load(engine, "first"), load(engine, "second")
run(first, 1), run(second, 1)
before = read("VmRSS")
"""


def execute(script: str, start: str = START, python: Path = Path(sys.executable)) -> list[int]:
    """Run a script, and return the numbers that it prints."""
    done = subprocess.run(
        [python, "-c", start + script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return [int(line) for line in done.stdout.split()]


def test_a_stage_uses_what_another_has_freed() -> None:
    (once, twice) = execute("""
run(first, 60)
print(read("VmHWM") - before)
run(second, 60)
print(read("VmHWM") - before)
""")
    assert once >= 2 * 60
    assert twice - once < 10


def test_memory_does_not_grow_with_the_number_of_sizes() -> None:
    (most,) = execute("""
for size in range(1, 41):
    run(first, size)
    run(second, size)
print(read("VmHWM") - before)
""")
    assert most < 2 * 3 * 40  # the input and two results of the largest size


@pytest.mark.parametrize("last", ["made", "first", "engine", "array", "cycle"])
def test_memory_is_released_with_the_last_stage_or_tensor(last: str) -> None:
    held, freed = execute(f"""
class Cycle:
    pass

made = run(first, 100)
array = engine.to_array(made)
cycle = Cycle()
cycle.itself, cycle.held = cycle, [first, made, array]
everything = dict(made=made, first=first, engine=engine, array=array, cycle=cycle)
one = everything["{last}"]
del everything, engine, first, second, made, array, cycle
if "{last}" != "cycle":
    gc.collect()
print(read("VmRSS") - before)
del one
gc.collect()
print(read("VmRSS") - before)
""")
    assert (held > 90) == (last != "engine")
    assert freed < 10


def test_a_later_engine_takes_and_releases_the_same_memory_again() -> None:
    for freed in execute("""
del engine, first, second
for _ in range(3):
    engine = Engine(threads=1)
    stage = load(engine, "again")
    run(stage, 100)
    del engine, stage
    print(read("VmRSS") - before)
"""):
        assert freed < 10


REGISTER = """
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as bindings
info = bindings.OrtMemoryInfo(
    "Cpu", bindings.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, bindings.OrtMemType.DEFAULT
)
onnxruntime.create_and_register_allocator(info, bindings.OrtArenaCfg({"max_mem": 1 << 20}))
"""


def test_a_program_may_have_registered_an_arena_before() -> None:
    (is_ours,) = execute(
        """
run(first, 8)  # more than the program's arena gives
print(int(open_arena() is not None))
""",
        REGISTER + START,
    )
    assert not is_ours


def test_without_an_arena_of_its_own_an_engine_does_not_open_the_shared_one() -> None:
    execute(
        """
assert engine._shared is None
""",
        START.replace("Engine(threads=1)", "Engine(threads=1, arena=False)"),
    )


def test_an_engine_may_end_with_the_interpreter() -> None:
    assert not execute("kept = run(first, 1)\nengine.itself = engine, kept")
