"""Find out how many channels a block of ONNX Runtime's blocked layout has on this machine.

The number depends on the processor, and some builds have no such layout: then it is 0.  ONNX
Runtime does not tell the number, so it is read off the order of known numbers.  One convolution is
compared with the plain kernel, so that a machine on which the layout means something else does
without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np

from splitonnx.runtime.engine.builds.installed import SILENT, list_exceptions
from splitonnx.runtime.engine.layouts.convolutions import DOMAIN, block_convolutions
from splitonnx.runtime.engine.layouts.messages import (
    write_attribute,
    write_model,
    write_node,
    write_opset,
    write_value,
)
from splitonnx.runtime.engine.providers import CPU, PROVIDERS

SIZES = (16, 8, 4)
"""The sizes that are looked for."""
_IR_VERSION, _OPSET_VERSION = 8, 17

Run = Callable[[bytes, Mapping[str, np.ndarray]], np.ndarray]
"""Runs a model and returns its only output."""


@cache
def find_block_size(runtime: Any, *, arena: bool = True) -> int:
    """Return the channels of a block in this ``onnxruntime``, or 0 if it has no blocked layout.

    ``arena`` is the setting of the sessions that come later: the first session of a process decides
    whether freed memory is kept.
    """
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.enable_cpu_mem_arena = arena
    options.log_severity_level = SILENT
    providers = [PROVIDERS[CPU].runtime_name]
    load = partial(runtime.InferenceSession, sess_options=options, providers=providers)
    return read_block_size(lambda model, feeds: load(model).run(None, dict(feeds))[0])


def read_block_size(run: Run) -> int:
    """Return the same for a function that runs models.

    An error of ONNX Runtime counts as "no such layout".
    """
    try:
        block = _read_size(run)
        return block if block and _is_right(run, block) else 0
    except list_exceptions():
        return 0


def _read_size(run: Run) -> int:
    """Return the size of a block by the order in which numbered channels lie in memory."""
    shape = (1, 2 * SIZES[0], 1, 2)
    numbered = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    node = write_node("ReorderInput", ["x"], "y", domain=DOMAIN)
    found = run(_write_model(node, {"x": shape}, shape), {"x": numbered}).ravel()
    for size in SIZES:
        blocked = numbered.reshape(-1, size, 2).transpose(0, 2, 1)
        if np.array_equal(found, blocked.ravel()):
            return size
    return 0


def _is_right(run: Run, block: int) -> bool:
    """Return whether a convolution gives the plain kernel's results in blocks of this size."""
    random = np.random.default_rng(0)
    shapes = {"x": (2, 2 * block, 5, 6), "w": (block, 2 * block, 3, 3)}
    feeds = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    pads = write_attribute("pads", [1, 1, 1, 1])
    node = write_node("Conv", ["x", "w"], "y", attributes=[pads])
    plain = _write_model(node, shapes, (2, block, 5, 6))
    blocked = block_convolutions(plain, block)
    return np.allclose(run(plain, feeds), run(blocked, feeds), rtol=1e-4, atol=1e-4)


def _write_model(
    node: bytes, inputs: Mapping[str, tuple[int, ...]], output: tuple[int, ...]
) -> bytes:
    """Return a model of one node with the output ``y``."""
    fields = [("node", node), ("name", b"g")]
    fields += [("input", write_value(name, shape)) for name, shape in inputs.items()]
    fields.append(("output", write_value("y", output)))
    opsets = [write_opset("", _OPSET_VERSION), write_opset(DOMAIN, 1)]
    return write_model(_IR_VERSION, opsets, fields)
