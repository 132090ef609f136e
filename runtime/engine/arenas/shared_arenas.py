"""The arena that all sessions of this process share.

By default each session of ONNX Runtime has an arena of its own, so what the forward stage freed is
not there for the backward stage or the update.  An arena grows by regions, and memory of two
regions never becomes one piece.  If a region is only as large as what is needed at that time, a
larger batch later fits into none, and the arena grows without end.  So the regions of this one are
large, each twice as large as the one before it.  The system gives memory where a region is written
to, but its table takes 1/32 of its size at once: that is why the first one is not larger.

ONNX Runtime has one shared arena for each process.  This module runs no stages.
"""

from __future__ import annotations

import sys
import threading
from functools import cache
from typing import Any

import numpy as np

from splitonnx.runtime.engine.builds.installed import (
    SILENT,
    get_bindings,
    import_onnxruntime,
    list_exceptions,
)
from splitonnx.runtime.engine.layouts.messages import (
    write_model,
    write_node,
    write_opset,
    write_value,
)
from splitonnx.runtime.engine.providers import CPU, PROVIDERS

REGION = 1 << 25
"""Bytes of the first region that is released when no session uses the arena any more.

Smaller ones take more memory with a transformer, larger ones with a ResNet-18.
"""
_FIRST = 1 << 12
"""Bytes of the region before it, the only one that ONNX Runtime never releases."""
_REMAINDER = 1 << 12
"""A free piece is divided if more bytes than this would be left of it."""
_GROW_AT_NEED = 0
"""Regions may be larger than what is needed at that time."""
_IR_VERSION, _OPSET_VERSION = 8, 17
_LOCK = threading.RLock()  # a lease may end while the same thread makes another


class Lease:
    """The right of one session to use the shared arena; it ends when nothing refers to it.

    Keep it exactly as long as the session.
    """

    # Without slots or a dictionary the garbage collector does not know it, so that in a cycle it
    # ends after what refers to it.
    __slots__ = ()

    def __del__(self) -> None:
        if sys.is_finalizing():
            return
        arena = open_arena()
        if arena is not None:
            arena.end_lease()


class SharedArena:
    """The shared arena, which keeps memory that stages free until no session uses it any more.

    ``runtime`` is the onnxruntime module.  Make it by :func:`open_arena`.

    Raises:
        RuntimeError: the program has registered a shared arena itself (ONNX Runtime 1.19).
    """

    def __init__(self, runtime: Any) -> None:
        bindings = get_bindings()
        kind, memory = bindings.OrtAllocatorType.ORT_ARENA_ALLOCATOR, bindings.OrtMemType.DEFAULT
        settings = {
            "arena_extend_strategy": _GROW_AT_NEED,
            "initial_chunk_size_bytes": _FIRST,
            "initial_growth_chunk_size_bytes": REGION,
            "max_dead_bytes_per_chunk": _REMAINDER,
        }
        bindings.create_and_register_allocator(
            bindings.OrtMemoryInfo("Cpu", kind, 0, memory), bindings.OrtArenaCfg(settings)
        )
        self._runtime = runtime
        self._leases = 0
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = SILENT
        self.join(options)
        providers = [PROVIDERS[CPU].runtime_name]
        self._session = runtime.InferenceSession(_write_graph(), options, providers=providers)
        self._number = np.zeros(1, np.float32)
        self._session.run(None, {"x": self._number})  # takes the first region
        self.release()  # the next region is as large as those that follow a release

    def join(self, options: Any) -> None:
        """Have the session that these options open use the arena; it has to have a lease."""
        options.add_session_config_entry("session.use_env_allocators", "1")

    def lease(self) -> Lease:
        """Return the right to use the arena."""
        with _LOCK:
            self._leases += 1
        return Lease()

    def end_lease(self) -> None:
        """Record that a lease has ended; after the last one, release the arena's memory."""
        with _LOCK:
            self._leases -= 1
            if not self._leases:
                self.release()

    def release(self) -> None:
        """Return all regions in which nothing is left to the system."""
        options = self._runtime.RunOptions()
        options.log_severity_level = SILENT
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        binding = self._session.io_binding()
        place = self._number.ctypes.data  # outside the arena, where it would hold a region
        for bind, name in ((binding.bind_input, "x"), (binding.bind_output, "y")):
            bind(name, "cpu", 0, np.float32, (1,), place)
        self._session.run_with_iobinding(binding, options)


@cache
def _open_arena() -> SharedArena | None:
    try:
        return SharedArena(import_onnxruntime())
    except list_exceptions():
        return None


def open_arena() -> SharedArena | None:
    """Return the arena of this process; ``None`` if sessions have to have arenas of their own.

    That is so if the program has registered a shared arena itself before, where ONNX Runtime says
    so, or if a reduced build lacks the operator that releases memory.
    """
    with _LOCK:  # so that only one is made
        return _open_arena()


def _write_graph() -> bytes:
    """Return a graph that does next to nothing."""
    node = write_node("Abs", ["x"], "y")
    declared = [("input", write_value("x", (1,))), ("output", write_value("y", (1,)))]
    fields = [("node", node), ("name", b"g"), *declared]
    return write_model(_IR_VERSION, [write_opset("", _OPSET_VERSION)], fields)
