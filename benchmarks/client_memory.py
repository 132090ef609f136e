"""What the client needs while the server's body grows from 4 to 64 layers of a transformer.

The client has the first layers, the same in all; the server has the others and the loss.  As in
``device_cost.py``, whose clients these are, each network is trained for some steps with a server,
and what the server said is then played back to fresh client processes.  It is done plainly, with
``--wire int8``, and with steps of four micro-batches beside; and with ``--recompute``.

Measured are the processor time of a step, and by how much the peak of resident memory grows over
what the process had resident before its first step, when libraries, weights and stages were loaded.
Allowed are 1.2 times the parameters, the optimizer's state, the stash and one wire, which
``check --at`` counts.  The weights that were loaded are part of what the growth is over, but each
step makes new ones beside them.  Pages of libraries that a step is the first to touch do not count,
as they are no one's data.  What kernels need at a time, gradients on their way, the second set of
the state that an update makes, and what ONNX Runtime's arenas keep have to be found in the 20 %:
with few layers, or small micro-batches, they are more than that.

Exit code 1 where time or memory of a client differs by more than 10 % from that with the smallest
body, or where more memory is needed than allowed.  Data are random.  For Linux.

    python benchmarks/client_memory.py [--rounds 3] [--steps 4]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from device_cost import WARM_UP, ClientProcess, divide_cores, on_cores
from playbacks import playing, recording
from resnets import serve
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import build_transformer

from splitonnx.bundles import Bundle
from splitonnx.disclosures import list_sent
from splitonnx.names import CLIENT, TRAIN
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.cutting.transforms.crossings import encode_crossings
from splitonnx.partitioner.cutting.transforms.recomputations import recompute_stages
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut_prepared
from splitonnx.partitioner.reports.memory.estimates import measure_bundle
from splitonnx.wire_codecs import read_wire

HEAD = 12
"""Layers of the client."""
BODIES = (4, 16, 64)
"""Layers of the server."""
BATCH = 32
TOLERANCE = 0.10
"""Largest part by which time and memory may differ from those with the smallest body."""
ALLOWED = 1.2
"""Largest growth of memory, in parameters, optimizer state, stash and one wire."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a network is cut and trained."""

    wire: str = "fp32"
    accumulate: int = 1
    recomputes: bool = False

    def __str__(self) -> str:
        told = [self.wire]
        told += [f"--accumulate {self.accumulate}"] * (self.accumulate > 1)
        return ", ".join([*told, *["--recompute"] * self.recomputes])


SETTINGS = (
    Setting(),
    Setting(wire="int8"),
    Setting(wire="int8", accumulate=4),
    Setting(wire="int8", recomputes=True),
)


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a client took: seconds of processor time a step, and bytes of memory.

    ``growth`` is the peak of its memory over its ``base``, and ``allowance`` what its parameters,
    optimizer state, stash and one wire take.  With ``--recompute`` the stash is there only while
    the backward stage runs.
    """

    setting: Setting
    layers: int
    own: float
    base: float
    growth: float
    allowance: float

    def is_like(self, other: Figures) -> bool:
        """Whether time and memory are within the tolerance of another client's."""
        pairs = ((self.own, other.own), (self.base + self.growth, other.base + other.growth))
        return all(abs(mine / theirs - 1) <= TOLERANCE for mine, theirs in pairs)

    @property
    def is_allowed(self) -> bool:
        """Whether the growth is within what is allowed."""
        return self.growth <= ALLOWED * self.allowance


def make_bundle(prepared: PreparedModel, setting: Setting) -> Bundle:
    """Cut a prepared network behind the client's layers."""
    bundle = cut_prepared(prepared, at=f"layer{HEAD - 1}")
    return encode_crossings(bundle, read_wire(setting.wire))


def count_allowance(bundle: Bundle, rows: int) -> int:
    """Count the bytes of the client's parameters, optimizer state, stash and largest wire."""
    memory = measure_bundle(bundle, rows)[0]
    sent = list_sent(bundle.client.manifest, TRAIN, CLIENT, rows).tensors
    wire = max(tensor.bytes or 0 for tensor in sent)
    return memory.parameters + memory.optimizer + (memory.stash or 0) + wire


def measure(
    bundle: Bundle, folder: Path, setting: Setting, rounds: int, steps: int
) -> Iterator[dict[str, float]]:
    """Train with a server, play it back, and yield what each fresh client took."""
    mine, others = divide_cores(os.sched_getaffinity(0))
    bundle.save(folder)
    client, sizes = folder / "client", (BATCH, 0, setting.accumulate)
    with ExitStack() as stack:
        with on_cores(others):
            served = stack.enter_context(serve(folder / "server", threads=len(others)))
        url, replies = stack.enter_context(recording(served))
        with ClientProcess("python", client, url, *sizes) as process:
            for _ in range(WARM_UP + steps):
                process.step()
            process.end()
    for _ in range(rounds):
        with (
            playing(replies) as url,
            on_cores(mine),
            ClientProcess("python", client, url, *sizes) as process,
        ):
            taken = [process.step() for _ in range(WARM_UP + steps)][WARM_UP:]
            memory = process.end()
        yield {"own": statistics.median(step["own"] for step in taken), **memory}


def measure_all(rounds: int, steps: int) -> Iterator[Figures]:
    """Yield the figures of every setting, for each body."""
    for layers in BODIES:
        prepared = prepare(open_model(build_transformer(layers=HEAD + layers)))
        for setting in SETTINGS:
            bundle = make_bundle(prepared, setting)
            trained = recompute_stages(bundle, "client") if setting.recomputes else bundle
            with tempfile.TemporaryDirectory() as folder:
                found = list(measure(trained, Path(folder, "bundle"), setting, rounds, steps))
            yield Figures(
                setting=setting,
                layers=layers,
                own=statistics.median(one["own"] for one in found),
                base=statistics.median(one["base"] for one in found),
                growth=statistics.median(one["peak"] - one["base"] for one in found),
                allowance=count_allowance(bundle, BATCH // setting.accumulate),
            )


def tabulate(figures: Sequence[Figures]) -> Table:
    """Lay out the figures, the settings apart."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (
        "setting", "server's layers", "processor / step", "loaded", "growth", "allowed for",
        "growth / that",
    ):  # fmt: skip
        table.add_column(heading, justify="right" if table.columns else "left")
    for setting in dict.fromkeys(one.setting for one in figures):
        for one in (one for one in figures if one.setting == setting):
            table.add_row(
                str(setting),
                str(one.layers),
                f"{one.own * 1000:.0f} ms",
                f"{one.base / 1e6:.1f} MB",
                f"{one.growth / 1e6:.1f} MB",
                f"{one.allowance / 1e6:.1f} MB",
                f"{one.growth / one.allowance:.2f}",
            )
    return table


def list_faults(figures: Sequence[Figures]) -> Iterator[str]:
    """Say which clients' needs grow with the body, and which need more than allowed."""
    first = {one.setting: one for one in reversed(figures)}
    for one in figures:
        if not one.is_like(first[one.setting]):
            yield f"{one.setting}: {one.layers} layers differ from {first[one.setting].layers}"
        if not one.is_allowed:
            yield f"{one.setting}: {one.layers} layers need more than {ALLOWED} times the sum"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3, help="clients of each network")
    parser.add_argument("--steps", type=int, default=4, help="steps of a client that count")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    figures = list(measure_all(options.rounds, options.steps))
    Console(highlight=False, width=None if sys.stdout.isatty() else 140).print(tabulate(figures))
    print(
        f"batch {BATCH}, {HEAD} layers on the client; medians of {options.rounds} clients of "
        f"{options.steps} steps.  Load before: {load:.1f} on {os.cpu_count()} cores"
    )
    faults = list(list_faults(figures))
    print("\n".join(faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
