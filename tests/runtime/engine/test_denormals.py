"""Denormals count as zero in every thread that runs a stage, and in no other code."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from onnx import helper

from splitonnx.runtime.engine.denormals import CAN_FLUSH, flushing_denormals
from splitonnx.runtime.engine.engines import Engine
from tests.runtime.engine.test_engines import graph

TINY = np.float32(1e-40)
PRODUCT = graph(helper.make_node("Mul", ["x", "w"], ["y"]), inputs="x w", outputs="y")

needs_flushing = pytest.mark.skipif(not CAN_FLUSH, reason="this platform has no way to flush")


def as_bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint32)


@needs_flushing
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_product_of_denormals_is_zero_in_every_element(threads: int, training: bool) -> None:
    """On earlier versions they stay; by ONNX Runtime's option alone, the calling thread's part."""
    engine = Engine(threads=threads)
    stage = engine.load("product", PRODUCT, training=training)
    size = 1 << 20  # so large that the work is divided among the threads
    feeds = {
        "x": engine.from_array(np.full(size, TINY)),
        "w": engine.from_array(np.full(size, np.float32(0.5))),
    }
    assert not as_bits(engine.to_array(engine.run(stage, feeds)["y"])).any()


def test_numpy_keeps_denormals_in_the_thread_that_loaded_and_ran_a_stage() -> None:
    """The first session of a process would otherwise set its thread's bits for good."""
    code = (
        "import numpy as np\n"
        "from splitonnx.runtime.engine.engines import Engine\n"
        "from tests.runtime.engine.test_denormals import PRODUCT\n"
        "engine = Engine(1)\n"
        "stage = engine.load('product', PRODUCT, training=True)\n"
        "x = np.full(16, 1e-40, np.float32)\n"
        "feed = engine.from_array(x)\n"
        "engine.run(stage, {'x': feed, 'w': feed})\n"
        "print((x * np.float32(0.5)).view(np.uint32).all())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"


def flush_and_fail() -> None:
    with flushing_denormals():
        assert not as_bits(np.full(16, TINY) * np.float32(0.5)).any()
        raise RuntimeError


@needs_flushing
def test_the_bits_are_restored_after_an_error() -> None:
    with pytest.raises(RuntimeError):
        flush_and_fail()
    assert as_bits(np.full(16, TINY) * np.float32(0.5)).all()
