"""Trials: one mutant each, cut in a forked process whose time and memory are limited.

Whatever comes out but a bundle or an error that finds the fault in the model is a finding: another
exception, one that owns up to a mistake of splitonnx, an abort, a mutant that takes too long or too
much memory.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from io import FileIO
from pathlib import Path
from random import Random
from typing import Literal

import onnx

from splitonnx.errors import InternalModelError, SplitonnxError
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import inspect
from tests.fuzzing.corpora import list_models, list_networks
from tests.fuzzing.mutations import mutate

SECONDS = 60.0
"""Of computing, which one mutant may take; a network of the onnx package takes some.

Where others compute too, it may take ten times as long.
"""
MEMORY = 3 << 30
"""Bytes that a mutant may ask for beyond what the process has."""

_BATCH = 200
_LOSSES = ("mse",) * 8 + ("l1", "cross-entropy", "bce-with-logits", "from-model")

Outcome = Literal["cut", "refused", "finding"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of the mutant of ``seed``; ``report`` says more of it."""

    seed: int
    outcome: Outcome
    report: str


@cache
def _corpus() -> tuple[Sequence[Sequence[bytes]], Sequence[bytes]]:
    return list_models(), list_networks()


def make_mutant(seed: int) -> bytes:
    """Make the mutant of a seed: the same one each time, for the same onnx package."""
    kinds, networks = _corpus()
    random = Random(seed)
    base = random.choice(networks if random.random() < 0.003 else random.choice(kinds))
    return mutate(random, base, random.choice(kinds))


def run_trials(seeds: Sequence[int]) -> Iterator[Trial]:
    """Try the mutants of the given seeds, in order, and yield what became of each."""
    _corpus()
    onnx.defs.get_all_schemas()
    place = 0
    while place < len(seeds):
        batch = seeds[place : place + _BATCH]
        for trial in _fork(batch):
            place += 1
            yield trial


def try_mutant(content: bytes, seed: int) -> tuple[Outcome, str]:
    """Cut a mutant in this process and say what came of it."""
    random = Random(-seed)
    try:
        places = [c.tensor for c in inspect(content)] if random.random() < 0.5 else []
        targets: tuple[Target, Target] = ("training", "portable")
        cut(
            content,
            at=random.choice(places) if places else None,
            loss=random.choice(_LOSSES),
            client_target=random.choice(targets),
            server_target=random.choice(targets),
        )
    except SplitonnxError as error:
        sentence = str(error)
        if "\n" in sentence or len(sentence) > 2000 or not sentence.isprintable():
            return "finding", f"an unprintable sentence: {sentence[:3000]!r}"
        if isinstance(error, InternalModelError):
            return "finding", traceback.format_exc()
        return "refused", f"{type(error).__name__}: {sentence}"
    except Exception:  # noqa: BLE001
        return "finding", traceback.format_exc()
    return "cut", ""


def _fork(seeds: Sequence[int]) -> Iterator[Trial]:
    """Try mutants in one forked process until the seeds are done or a mutant ends it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work(seeds, writer)
    os.close(writer)
    lines = _read_lines(reader, child)
    for seed in seeds:
        try:
            line = next(lines)
        except (EOFError, TimeoutError) as error:
            yield Trial(seed=seed, outcome="finding", report=f"{error}{_reap(child)}")
            return
        outcome, _, report = line.partition(" ")
        report = report.replace("\\n", "\n")
        yield Trial(seed=seed, outcome=outcome, report=report)  # type: ignore[arg-type]
    _reap(child)


def _read_lines(reader: int, child: int) -> Iterator[str]:
    content = b""
    with os.fdopen(reader, "rb", buffering=0) as file:
        while True:
            line, newline, rest = content.partition(b"\n")
            if newline:
                content = rest
                yield line.decode(errors="replace")
                continue
            _wait(file, child)
            read = file.read(1 << 16)
            if not read:
                raise EOFError("it ended the process")
            content += read


def _wait(file: FileIO, child: int) -> None:
    """Wait until there is something to read, or a mutant has had its time."""
    spent = _measure(child)
    for _ in range(10):
        if select.select([file], [], [], SECONDS)[0]:
            return
        if _measure(child) - spent > SECONDS:
            break
    raise TimeoutError(f"it took over {SECONDS} s")


def _measure(process: int) -> float:
    """Return the seconds that a process and those that it started have computed."""
    folder = Path(f"/proc/{process}")
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
        children = (folder / f"task/{process}/children").read_text().split()
    except OSError:  # it has ended
        return 0.0
    ticks = sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK") + sum(_measure(int(child)) for child in children)


def _reap(child: int) -> str:
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return f" ({signal.Signals(-code).name})" if code < 0 else f" (exit code {code})"


def _work(seeds: Sequence[int], writer: int) -> None:
    """Try mutants in the forked process, which this never leaves."""
    warnings.simplefilter("ignore")
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        for seed in seeds:
            outcome, report = try_mutant(make_mutant(seed), seed)
            line = report.replace("\n", "\\n")
            os.write(writer, f"{outcome} {line}\n".encode(errors="replace"))
    finally:
        os._exit(0)
