"""Sessions on an execution provider other than the CPU, which are checked against the CPU.

Providers are less exact than ONNX Runtime's own kernels: some refuse graphs that they claimed, and
some compute wrong values without an error (for example, by computing 64-bit integers in 32 bits).
Therefore the first run of a stage with inputs of given shapes runs on the CPU, too.  If the results
differ, or the provider fails, the stage stays on the CPU from then on, and :class:`Accelerator`
says so.  ONNX Runtime is handed to this module; the module does not import it.
"""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary, finalize

import numpy as np

from splitonnx.errors import WrongRuntime
from splitonnx.kernel_errors import describe_kernel_error
from splitonnx.runtime.engine.denormals import flushing_denormals
from splitonnx.runtime.engine.placements import Placement, StagePlacement, read_profile
from splitonnx.runtime.engine.providers import PROVIDERS, Provider, check_carried

TOLERANCE = 1e-3
"""The largest difference from the CPU, relative to the norm of the CPU's values.

Where exact values decide, such as whether an activation is positive, rounding alone gives single
other elements.  What providers compute wrongly differs by far more.
"""
NOISE = 1e-7
"""A difference per element that is always allowed: a gradient may be nothing but rounding."""
MOST_CHECKED = 16
"""Most combinations of input shapes with which a stage is checked."""
_MOST_LETTERS = 160
"""Most characters that are quoted of a provider's error."""

_NODE = re.compile(r"While validating ONNX node '<Node\((\w+)\): ([^>]*)>': (.+)")
_PLACE = re.compile(
    r"Exception from \S+:\d+: |Check '.*?' failed at \S+:\d+: |.*? Status Message: "
    r"|While validating .*"
)

_PROBE = (
    b'\x08\x08:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01pZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12'
    b"\x04\n\x02\x08\x02b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x02B\x04\n\x00\x10\x12"
)
"""A model that adds two numbers to themselves, to see whether a provider starts."""

LOGGER = "splitonnx.engine"
"""The name of the logger that says of each stage where it runs."""
_logger = logging.getLogger(LOGGER)

_Open = Callable[[], Any]
"""A function that opens a session on the CPU."""


class Accelerator:
    """An execution provider that starts on this machine, and the stages that were opened on it.

    ``ort`` is ONNX Runtime, ``failures`` are the exceptions that it raises, and ``to_array``
    returns the values of a tensor in the host's memory.

    Raises:
        WrongRuntime: the installed ONNX Runtime does not have the provider, or cannot start it.
    """

    def __init__(
        self,
        ort: Any,
        provider: Provider,
        *,
        threads: int | None,
        installed: str,
        failures: tuple[type[Exception], ...],
        to_array: Callable[[Any], np.ndarray],
    ) -> None:
        check_carried(provider, ort.get_available_providers(), installed)
        self.provider = provider
        self.failures = failures
        self.to_array = to_array
        self._ort = ort
        settings = provider.list_settings(threads)
        self._providers = [(provider.runtime_name, settings), PROVIDERS["cpu"].runtime_name]
        self._sessions: WeakValueDictionary[int, AcceleratedSession] = WeakValueDictionary()
        self._numbers = count()
        self._folder = Path(tempfile.mkdtemp(prefix="splitonnx-profiles-"))
        finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._start(installed)

    def open(self, stage: str, graph: bytes, options: Any, open_here: _Open) -> AcceleratedSession:
        """Open a stage's session on the provider; on the CPU, if the provider refuses it.

        ``options`` are the session options, and ``open_here`` opens the stage on the CPU.
        """
        if not self.provider.is_optimized:
            options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.enable_mem_pattern = self.provider.has_memory_patterns
        options.enable_profiling = True
        number = next(self._numbers)
        options.profile_file_prefix = str(self._folder / str(number))
        opened: Any = None
        reason = ""
        try:
            opened = self._open(graph, options)
        except self.failures as error:
            reason = f"it refuses the graph: {_shorten(error)}"
        session = AcceleratedSession(stage, self, opened, open_here, reason=reason)
        self._sessions[number] = session
        return session

    def describe(self) -> Placement | None:
        """Return where the stages run of which this is known, or ``None`` if there are none yet.

        It is known of a stage that ran twice, or that was left to the CPU.
        """
        found = (session.placement for session in self._sessions.values())
        stages = [placement for placement in found if placement is not None]
        return Placement(provider=str(self.provider), stages=stages) if stages else None

    def put(self, array: np.ndarray) -> Any:
        """Return ONNX Runtime's value for an array, in the memory in which tensors stay."""
        make = self._ort.OrtValue.ortvalue_from_numpy
        if not self.provider.memory or array.size == 0:
            return make(array)
        return make(array, self.provider.memory, self.provider.device_number)

    def take(self, value: Any) -> Any:
        """Return a value in the host's memory, where the CPU's kernels can read it."""
        if value.device_name() == "cpu":
            return value
        return self._ort.OrtValue.ortvalue_from_numpy(value.numpy())

    def _open(self, graph: bytes, options: Any) -> Any:
        with flushing_denormals():  # otherwise the first session would set it for good
            session = self._ort.InferenceSession(
                graph, options, providers=self._providers, enable_fallback=0
            )
        if self.provider.runtime_name not in session.get_providers():
            raise RuntimeError("ONNX Runtime leaves it out without a reason")
        return session

    def _start(self, installed: str) -> None:
        options = self._ort.SessionOptions()
        options.log_severity_level = 4
        array = np.ones(2, np.float32)
        reason = ""
        try:
            (found,) = self._open(_PROBE, options).run(None, {"x": array})
            if not np.array_equal(found, array + array):
                reason = f"it adds 1 and 1 to {found[0]:g}"
        except self.failures as error:
            reason = _shorten(error)
        if reason:
            raise WrongRuntime(
                installed,
                f"the provider {self.provider} to start, which fails here: {reason}; check the "
                "device, its driver and its libraries, or leave out --provider",
            )


class AcceleratedSession:
    """A stage's session on a provider, with the methods of a session that the engine uses.

    One run at a time: not every provider allows more.
    """

    def __init__(
        self, stage: str, on: Accelerator, opened: Any, open_here: _Open, *, reason: str
    ) -> None:
        self.placement: StagePlacement | None = None
        self._stage = stage
        self._on = on
        self._session = opened
        self._open_here = open_here
        self._here: Any = None
        self._reason = reason
        self._checked: set[tuple[tuple[str, tuple[int, ...]], ...]] = set()
        self._runs = 0
        self._is_profiling = opened is not None
        self._lock = threading.Lock()
        if reason:
            self._here = open_here()
            self._note(StagePlacement(stage=stage, reason=reason))

    def get_outputs(self) -> Any:
        """Return the descriptions of the outputs."""
        return (self._here if self._session is None else self._session).get_outputs()

    def run_with_ort_values(
        self, names: Sequence[str], feeds: Mapping[str, Any], options: Any
    ) -> Sequence[Any]:
        """Run the stage, and return its outputs in the order of ``names``."""
        with self._lock:
            began = time.perf_counter()
            is_new = False
            if self._reason:
                produced = self._run_here(names, feeds, options)
            else:
                shapes = tuple(sorted((n, tuple(v.shape())) for n, v in feeds.items()))
                is_new = shapes not in self._checked and len(self._checked) < MOST_CHECKED
                produced = self._run_there(names, feeds, options)
            seconds = time.perf_counter() - began
            if is_new and not self._reason:
                produced = self._check(names, feeds, options, produced)
                self._checked.add(shapes)
            self._runs += 1
            if self._runs == 2:
                self._measure(seconds)
            return produced

    def _run_there(
        self, names: Sequence[str], feeds: Mapping[str, Any], options: Any
    ) -> Sequence[Any]:
        try:
            return self._bind_and_run(names, feeds, options)
        except self._on.failures as error:
            if options.terminate:  # it was stopped
                raise
            produced = self._run_here(names, feeds, options)  # raises if the inputs are at fault
            self._leave(f"it fails: {_shorten(error)}")
            return produced

    def _bind_and_run(
        self, names: Sequence[str], feeds: Mapping[str, Any], options: Any
    ) -> Sequence[Any]:
        provider = self._on.provider
        produced: Sequence[Any]
        if not provider.memory:
            produced = self._session.run_with_ort_values(names, feeds, options)
            return produced
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in names:  # without a place of its own, an output is copied to the host
            binding.bind_output(name, provider.memory, provider.device_number)
        self._session.run_with_iobinding(binding, options)
        produced = binding.get_outputs()
        return produced

    def _run_here(
        self, names: Sequence[str], feeds: Mapping[str, Any], options: Any
    ) -> Sequence[Any]:
        if self._here is None:
            self._here = self._open_here()
        taken = {name: self._on.take(value) for name, value in feeds.items()}
        produced: Sequence[Any] = self._here.run_with_ort_values(names, taken, options)
        return produced

    def _check(
        self, names: Sequence[str], feeds: Mapping[str, Any], options: Any, produced: Sequence[Any]
    ) -> Sequence[Any]:
        """Compare a run's outputs with the CPU's, and return those that are right."""
        expected = self._run_here(names, feeds, options)
        for name, found, right in zip(names, produced, expected, strict=True):
            difference = compare(self._on.to_array(self._on.take(found)), self._on.to_array(right))
            if difference > TOLERANCE:
                self._leave(f"its values of '{name}' differ by {difference:.2g} of their norm")
                return expected
        self._here = None
        return produced

    def _leave(self, reason: str) -> None:
        """Leave the stage to the CPU from now on."""
        self._end_profile()
        self._reason = reason  # earlier outputs may still lie in the provider's session
        self._note(StagePlacement(stage=self._stage, reason=reason))

    def _measure(self, seconds: float) -> None:
        if self._reason:
            found = StagePlacement(
                stage=self._stage, reason=self._reason, seconds=seconds, cpu_seconds=seconds
            )
            self.placement = found
            return
        profile = read_profile(self._end_profile())
        found = StagePlacement(
            stage=self._stage,
            left=profile.left,
            seconds=seconds,
            cpu_seconds=seconds * profile.share,
        )
        self._note(found)

    def _end_profile(self) -> bytes:
        """End the profile, which costs time, and return it; an empty one, if it ended before."""
        if not self._is_profiling:
            return b"[]"
        self._is_profiling = False
        path = Path(self._session.end_profiling())
        text = path.read_bytes()
        path.unlink()
        return text

    def _note(self, placement: StagePlacement) -> None:
        self.placement = placement
        _logger.info("%s", placement.describe(str(self._on.provider)))


def compare(found: np.ndarray, right: np.ndarray) -> float:
    """Return how much values differ from the right ones, relative to the norm of these.

    It is infinite if the shapes differ, or if one of the two has a NaN or infinity where the other
    does not.
    """
    if found.shape != right.shape or found.dtype != right.dtype:
        return float("inf")
    if right.size == 0 or np.array_equal(found, right):
        return 0.0
    one, other = (array.astype(np.float64) for array in (found, right))
    is_finite = np.isfinite(other)
    if not np.array_equal(one[~is_finite], other[~is_finite], equal_nan=True):
        return float("inf")
    one, other = one[is_finite], other[is_finite]
    distance = float(np.linalg.norm(one - other))
    if np.isnan(distance):
        return float("inf")
    allowed = float(np.linalg.norm(other)) + NOISE / TOLERANCE * float(np.sqrt(other.size))
    return distance / allowed


def _shorten(error: Exception) -> str:
    """Return in a few words what a provider says in an error, without places in its source."""
    text = " ".join(str(error).split())
    node = _NODE.search(text)
    if node is not None:
        text = f"node '{node[2]}' ({node[1]}): {node[3]}"
    else:
        text = describe_kernel_error(text).rpartition("[OpenVINO-EP] ")[2]
    text = _PLACE.sub("", text).strip()
    return text if len(text) <= _MOST_LETTERS else f"{text[:_MOST_LETTERS].rstrip()} ..."
