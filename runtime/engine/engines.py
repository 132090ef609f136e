"""Load and run stage graphs with the installed ONNX Runtime.

This module does not expose onnxruntime's own values or exceptions.  It handles graphs, arrays and
threads, but not phases, wires or training steps.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from splitonnx.cores import count_cores, is_bound
from splitonnx.element_types import ELEMENT_TYPES
from splitonnx.errors import StageFailed, WrongRuntime
from splitonnx.kernel_errors import describe_kernel_error
from splitonnx.runtime.engine.accelerators import Accelerator
from splitonnx.runtime.engine.arenas.shared_arenas import open_arena
from splitonnx.runtime.engine.builds.installed import (
    SILENT,
    detach,
    import_onnxruntime,
    installed_runtime,
    list_exceptions,
)
from splitonnx.runtime.engine.denormals import CAN_FLUSH, flushing_denormals
from splitonnx.runtime.engine.early.halves import OpenedHalves
from splitonnx.runtime.engine.invariants.sessions import DividedSession
from splitonnx.runtime.engine.placements import Placement
from splitonnx.runtime.engine.providers import CPU, PROVIDERS, choose_provider
from splitonnx.runtime.engine.runs import Runs
from splitonnx.runtime.engine.tiles.sessions import open_arranged
from splitonnx.runtime.gate.gates import check_graph, is_ort_format
from splitonnx.session_settings import EXACT_SETTINGS

_ELEMENT_TYPES: Mapping[str, np.dtype[np.generic]] = {
    kind.runtime: kind.dtype for kind in ELEMENT_TYPES
}
_UNKNOWN_OPERATOR = re.compile(
    r"No Op registered for (\w+)|(\S+?)(?:\(-?\d+\))? is not a registered"
)
_CPU = PROVIDERS[CPU].runtime_name


class Tensor:
    """A tensor in ONNX Runtime's memory, created by :class:`Engine`.

    Use :meth:`Engine.to_array` to read its values.
    """

    # Freed in this order: the session may be the last that has a lease of the arena.
    __slots__ = ("_value", "_within")

    def __init__(self, value: Any, session: Any = None) -> None:
        self._value = value
        self._within = session  # a constant output lives in its session's memory

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": tuple(self._value.shape()),
            "typestr": _ELEMENT_TYPES[self._value.data_type()].str,
            "data": (self._value.data_ptr(), True),  # True: read-only
        }


@dataclass(frozen=True, kw_only=True)
class LoadedStage:
    """A stage graph that is ready to run; ``outputs`` are the names of those that a run returns.

    Inputs ``zeros`` may be left out if they are zero; ``sources`` maps renamed inputs, by output.
    If the stage is divided, ``then`` is its other part, which takes the outputs ``handed``, too.
    """

    name: str
    outputs: tuple[str, ...]
    session: Any
    zeros: frozenset[str] = frozenset()
    sources: Mapping[str, str] = field(default_factory=dict)
    handed: tuple[str, ...] = ()
    then: LoadedStage | None = None

    def choose(self, outputs: Sequence[str]) -> LoadedStage:
        """Return the stage with these outputs alone, and what its parts hand on."""
        then = None if self.then is None else self.then.choose(outputs)
        if then is not None and not then.outputs:
            then = None
        handed = () if then is None else self.handed
        own = tuple(name for name in self.outputs if name in outputs or name in handed)
        return replace(self, outputs=own, handed=handed, then=then)


class Engine:
    """An engine that loads stage graphs into ONNX Runtime and runs them.

    ``threads`` is the number of threads per operator; ``None`` means all cores that the
    process may use.  Other Python threads can run while a stage is running.  ``provider`` is the
    execution provider, ``NAME`` or ``NAME:DEVICE`` (:mod:`providers`); what it cannot run
    correctly, the CPU runs (:mod:`accelerators`), and :meth:`describe_placement` says what that is.

    Set ``trusted`` only if you trust whoever made the bundle.  Only then are graphs in ORT format
    accepted, because the gate cannot check such graphs.  ``arena`` means that ONNX Runtime keeps
    the memory that a stage frees, and reuses it for any stage on the CPU (:mod:`shared_arenas`).

    A stage that runs longer than ``stage_seconds`` is stopped, but only between two operators.
    Ctrl-C stops a stage that is running in the main thread.  ``on_stuck`` is called with the name
    of a stage that does not stop when it should.  Denormals are flushed to zero in every thread if
    the platform supports it (:mod:`denormals`).

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        UsageError: there is no such provider.
        WrongRuntime: the installed ONNX Runtime does not have the provider, or cannot start it.
    """

    def __init__(
        self,
        threads: int | None = None,
        *,
        provider: str = CPU,
        trusted: bool = False,
        arena: bool = True,
        stage_seconds: float | None = None,
        on_stuck: Callable[[str], object] | None = None,
    ) -> None:
        self._ort = import_onnxruntime()
        self._threads = threads
        self._trusted = trusted
        self._arena = arena
        self._running = Runs(stage_seconds, on_stuck)
        self.provider = choose_provider(provider)
        self._accelerator = self._accelerate() if self.provider.name != CPU else None
        self._shared = open_arena() if arena and self._accelerator is None else None

    def describe_placement(self) -> Placement | None:
        """Return what the provider left to the CPU so far; ``None`` for the CPU or if unknown."""
        return None if self._accelerator is None else self._accelerator.describe()

    def load(
        self,
        name: str,
        graph: bytes,
        *,
        training: bool,
        steady: Collection[str] = (),
        sums: Mapping[str, str] = {},
        early: Collection[str] = (),
    ) -> LoadedStage:
        """Check a stage graph with the gate and load it into ONNX Runtime.

        ``training`` means that ONNX Runtime does not optimize the graph: it was optimized before
        it was differentiated, and split and unsplit runs must use the same kernels.  Convolutions
        run on blocked images (:mod:`layouts`), updates of large parameters over tiles
        (:mod:`tiles`).  What depends on the inputs ``steady`` alone is kept between runs
        (:mod:`invariants`).  ``sums`` maps inputs that a run may change to the outputs that replace
        them.  If the stage has much to do that outputs ``early`` do not need, it is divided
        (:mod:`halves`).  A graph in ORT format runs as it is, if the engine is ``trusted``.

        Raises:
            ForbiddenGraph: the gate refused the graph; ONNX Runtime did not see it.
            WrongRuntime: the graph has operators of onnxruntime-training, which is not installed.
            StageFailed: ONNX Runtime refuses the graph for another reason.
        """
        own_format = self._trusted and is_ort_format(graph)
        if not own_format:
            check_graph(name, graph)
        make_options = partial(self._make_options, training=training, own_format=own_format)
        open_here = partial(self._open, name, make_options)
        if self._accelerator is not None:
            session = self._accelerator.open(name, graph, make_options(), partial(open_here, graph))
        elif own_format:
            session = open_here(graph)
        else:
            session = open_arranged(
                graph,
                self._ort,
                open_here,
                steady,
                sums,
                threads=self._threads,
                keeps=self._arena,
                early=early,
            )
        if not isinstance(session, OpenedHalves):
            return _describe(name, session)
        then = _describe(name, session.rest)
        return replace(_describe(name, session.first), handed=session.handed, then=then)

    def _make_options(self, *, training: bool, own_format: bool) -> Any:
        levels = self._ort.GraphOptimizationLevel
        options = self._ort.SessionOptions()
        level = levels.ORT_DISABLE_ALL if training else levels.ORT_ENABLE_ALL
        options.graph_optimization_level = level
        # By itself, it makes a thread for each core of the machine and binds it there, also to
        # cores that this process may not use.
        options.intra_op_num_threads = self._threads or (count_cores() if is_bound() else 0)
        options.enable_cpu_mem_arena = self._arena
        # From the second run on, all results would be in one block beside what the first freed.
        options.enable_mem_pattern = False
        if self._shared is not None:
            self._shared.join(options)
        # A thread that spins while it waits for the next stage takes the core from the other party.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Otherwise it would detect the format, and could mistake the bytes for ORT format.
        model_format = "ORT" if own_format else "ONNX"
        options.add_session_config_entry("session.load_model_format", model_format)
        return self._complete(options)

    def convert(self, name: str, graph: bytes, *, training: bool) -> bytes:
        """Convert a stage graph to ORT format, which reduced ONNX Runtime builds need.

        Unless ``training`` is true, the graph is optimized, by rules that are valid everywhere.

        Raises:
            ForbiddenGraph, WrongRuntime, StageFailed: as raised by :meth:`load`.
        """
        check_graph(name, graph)
        levels = self._ort.GraphOptimizationLevel
        options = self._ort.SessionOptions()
        level = levels.ORT_DISABLE_ALL if training else levels.ORT_ENABLE_BASIC
        options.graph_optimization_level = level
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.load_model_format", "ONNX")
        options.add_session_config_entry("session.save_model_format", "ORT")
        with tempfile.TemporaryDirectory() as folder:  # it writes to a path only
            written = Path(folder, "stage.ort")
            options.optimized_model_filepath = str(written)
            self._open(name, lambda: self._complete(options), graph)
            return written.read_bytes()

    def _accelerate(self) -> Accelerator:
        return Accelerator(
            self._ort,
            self.provider,
            threads=self._threads,
            installed=str(installed_runtime()),
            failures=list_exceptions(),
            to_array=lambda value: _view(Tensor(value)),
        )

    def _complete(self, options: Any) -> Any:
        """Add every session's settings."""
        options.log_severity_level = SILENT
        for entry in EXACT_SETTINGS.items():
            options.add_session_config_entry(*entry)
        if CAN_FLUSH:
            options.add_session_config_entry("session.set_denormal_as_zero", "1")
        return options

    def _open(
        self, name: str, make_options: Callable[[], Any], graph: bytes, threads: int | None = None
    ) -> Any:
        options = make_options()
        options.intra_op_num_threads = threads or options.intra_op_num_threads
        try:
            with flushing_denormals():  # otherwise the first session would set it for good
                session = self._ort.InferenceSession(graph, options, providers=[_CPU])
        except list_exceptions() as error:
            _refuse(name, error)
        if self._shared is not None:
            session.splitonnx_lease = self._shared.lease()
        return session

    def from_array(self, array: np.ndarray) -> Tensor:
        """Return a tensor with the values of an array.

        The array is copied only if it is not contiguous or not aligned.  Do not change the array
        afterwards, because the tensor may share its memory.
        """
        contiguous = np.require(array, requirements=["C", "A"])
        if self._accelerator is not None:
            return Tensor(self._accelerator.put(contiguous))
        return Tensor(self._ort.OrtValue.ortvalue_from_numpy(contiguous))

    def to_array(self, tensor: Tensor) -> np.ndarray:
        """Return a tensor's values as a read-only array that shares the tensor's memory.

        The array keeps that memory alive.  Values in a device's memory are copied.
        """
        if self._accelerator is not None:
            tensor = Tensor(self._accelerator.take(tensor._value), tensor._within)
        return _view(tensor)

    def run(self, stage: LoadedStage, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a stage with the inputs in ``feeds``, and return its outputs by name.

        Raises:
            StageFailed: an operator failed, or the inputs do not fit the graph.
            StageTooSlow, StageStopped: it exceeded its time limit, or :meth:`stop` was called.
        """
        values = {name: tensor._value for name, tensor in feeds.items()}
        with self._watching(stage) as options:
            produced = stage.session.run_with_ort_values(stage.outputs, values, options)
        # A graph's input that is also its output comes back as a second handle on the same memory,
        # which does not keep that memory alive: the feed itself does.
        return {
            name: feeds.get(stage.sources.get(name, name)) or Tensor(detach(value), stage.session)
            for name, value in zip(stage.outputs, produced, strict=True)
        }

    def renew(self, stage: LoadedStage, tensors: Mapping[str, Tensor]) -> None:
        """Compute what the next run would compute of inputs that are the same for many runs.

        ``tensors`` has these inputs, and may have more.

        Raises:
            StageFailed, StageTooSlow, StageStopped: see :meth:`run`.
        """
        part: LoadedStage | None = stage
        while part is not None:
            if isinstance(part.session, DividedSession):
                values = {name: tensors[name]._value for name in part.session.reads}
                with self._watching(part) as options:
                    part.session.renew(values, options)
            part = part.then

    @contextmanager
    def _watching(self, stage: LoadedStage) -> Iterator[Any]:
        """Yield the options of a run, which :meth:`stop` and a time limit may end."""
        options = self._ort.RunOptions()
        options.log_severity_level = SILENT
        run = self._running.begin(stage.name, options)
        try:
            with flushing_denormals():
                yield options
        except list_exceptions() as error:
            run.explain(error, _one_line(error), self._running.seconds)
        finally:
            self._running.finish(run)

    def stop(self) -> None:
        """Stop all running stages and run no more stages; call this from another thread."""
        self._running.stop()


def _describe(name: str, session: Any) -> LoadedStage:
    outputs = tuple(output.name for output in session.get_outputs())
    more = {n: getattr(session, n) for n in ("zeros", "sources") if hasattr(session, n)}
    return LoadedStage(name=name, outputs=outputs, session=session, **more)


def _view(tensor: Tensor) -> np.ndarray:
    if 0 in tensor._value.shape():  # it has no memory to share
        interface = tensor.__array_interface__
        return np.empty(interface["shape"], interface["typestr"])
    return np.asarray(tensor)


def _refuse(stage: str, error: Exception) -> NoReturn:
    unknown = _UNKNOWN_OPERATOR.search(str(error))
    runtime = installed_runtime()
    if unknown and not runtime.training:
        raise WrongRuntime(
            str(runtime),
            f"the training operator {unknown[1] or unknown[2]} (stage '{stage}'); install "
            "splitonnx[cpu], or cut the model with the target portable",
        ) from error
    raise StageFailed(stage, _one_line(error)) from error


def _one_line(error: Exception) -> str:
    return describe_kernel_error(str(error))[:400]
