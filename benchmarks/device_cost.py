"""What a step costs the device while the server's body grows from ResNet-18 to ResNet-152.

Every network is cut at the end of its first pooling and again at its logits: U-shaped, the client
has the stem, the loss and the labels, the same in all five; ResNet-18 and -34 end in 512 features
and the others in 2048, so a classifier on the client would not be.

First each network is trained for some steps with its own `splitonnx serve` process, and the
server's messages are recorded.  A device shares neither processor nor memory with the server, so
they are then played back (``playbacks.py``) to fresh client processes, in Python
(``device_client.py``) or in Node (``runtime/js/scripts/device.ts``, built by ``make test-js``),
which measure themselves, on a core of their own.  Beside a server at work, on the same machine, the
clients of deeper networks came out up to 16 % cheaper.  The networks take turns, step by step,
forwards and backwards, so that a drifting machine strikes all alike: the ratio is to the same
turn's ResNet-18, and the median over all turns counts.

Exit code 1 where, for some network, the client's processor time a sample, its wall time without the
waiting, or its peak memory leaves ResNet-18's by more than 10 %.  Data are random.  For Linux.

    python benchmarks/device_cost.py [--client node] [--rounds 8] [--steps 8] [--plot cost.svg]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from playbacks import playing, recording
from resnets import BLOCKS, build_resnet, serve
from rich import box
from rich.console import Console
from rich.table import Table

from splitonnx.partitioner.partitions import cut

ROOT = Path(__file__).parents[1]
SIDE = 64
"""Pixels of an image's side."""
BATCH = 16
WARM_UP = 2
"""Steps of a client that do not count."""
TOLERANCE = 0.10
"""Largest part by which the client's cost may differ from that at ResNet-18."""
DECIDING = ("own", "awake", "peak")
"""The figures of the client that must stay: processor time, wall time without waiting, memory."""
SHOWN = (*DECIDING, "wire")
"""What a client measures, see ``device_client.py``."""
CLIENTS = {
    "python": (sys.executable, "benchmarks/device_client.py"),
    "node": ("node", "runtime/js/build/scripts/device.js"),
}
"""What runs a client of each language, from the repository's root."""

Turn = Mapping[int, Mapping[str, float]]
"""What one step of each network cost its client, by the network's depth; times in seconds."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """What is played back of a network: the client's ``folder`` and the server's ``replies``.

    ``parameters`` are the server's, ``wall`` the seconds of a whole step with it.
    """

    folder: Path
    parameters: int
    wall: float
    replies: Sequence[bytes] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A network's figures: medians over the turns, ``ratios`` of them to ResNet-18's.

    Times are seconds a sample, ``wall`` a step with the server; ``peak`` is in bytes, ``wire`` in
    bytes a sample; ``parameters`` are the server's.
    """

    depth: int
    parameters: int
    wall: float
    figures: Mapping[str, float]
    ratios: Mapping[str, float]

    def is_constant(self, names: Collection[str]) -> bool:
        """Whether these figures are ResNet-18's, within the tolerance."""
        return all(abs(self.ratios[name] - 1) <= TOLERANCE for name in names)


def cut_network(depth: int, folder: Path) -> int:
    """Cut a network into a bundle; return the number of parameters that the server trains."""
    model = build_resnet(depth, side=SIDE)
    bundle = cut(model, at="stem", tail_at="logits", client_target="portable")
    bundle.save(folder)
    return sum(
        int(np.prod(weight.dims))
        for weight in model.graph.initializer
        if not weight.name.startswith("conv0") and not weight.name.endswith((".mean", ".var"))
    )


def divide_cores(cores: Collection[int]) -> tuple[set[int], set[int]]:
    """Divide cores into the clients', of which one steps at a time, and the servers'.

    A single core is both's.
    """
    *others, last = sorted(cores)
    return {last}, set(others or (last,))


@contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """Let the processes that are started here run on these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class ClientProcess:
    """A client that takes its steps when told to; ``sizes`` are the numbers of its script."""

    def __init__(self, language: str, folder: Path, url: str, *sizes: int) -> None:
        runner, script = CLIENTS[language]
        numbers = map(str, sizes or (BATCH, SIDE))
        command = [runner, str(ROOT / script), str(folder), url, *numbers]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> ClientProcess:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:  # closes its pipes and waits for its end
            self._process.kill()

    def step(self) -> dict[str, float]:
        """Take a step and give its cost; an EOFError where the process has ended."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._hear()

    def finish(self) -> float:
        """End the training; give the peak of its memory, in bytes."""
        return self.end()["peak"]

    def end(self) -> dict[str, float]:
        """End the training; give the figures of its memory, in bytes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._hear()

    def _hear(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError(f"the client ended with code {self._process.wait()}")
        found: dict[str, float] = json.loads(line)
        return found


def train_round(clients: Mapping[int, ClientProcess], steps: int) -> list[Turn]:
    """Let the networks' clients step in turn; what comes before the counted steps warms up."""
    turns: list[dict[int, dict[str, float]]] = []
    for number in range(WARM_UP + steps):
        order = sorted(clients, reverse=number % 2 == 1)
        turns.append({depth: clients[depth].step() for depth in order})
    peaks = {depth: client.finish() for depth, client in clients.items()}
    return [
        {depth: {**one, "peak": peaks[depth]} for depth, one in turn.items()}
        for turn in turns[WARM_UP:]
    ]


def record_network(depth: int, folder: Path, language: str, steps: int) -> Network:
    """Cut a network, train it with a server at work, and keep what the server says."""
    mine, others = divide_cores(os.sched_getaffinity(0))
    parameters = cut_network(depth, folder)
    with ExitStack() as stack:
        # As many threads as cores: left to itself, ONNX Runtime makes one for each core of the
        # machine and binds it there, the clients' core too.
        with on_cores(others):
            served = stack.enter_context(serve(folder / "server", threads=len(others)))
        url, replies = stack.enter_context(recording(served))
        with on_cores(mine):
            client = stack.enter_context(ClientProcess(language, folder / "client", url))
        walls = [client.step()["wall"] for _ in range(WARM_UP + steps)]
        client.finish()
    wall = statistics.median(walls[WARM_UP:])
    return Network(folder=folder / "client", parameters=parameters, wall=wall, replies=replies)


def measure(language: str, rounds: int, steps: int) -> tuple[dict[int, Network], list[Turn]]:
    """Cut, train and record every network; play them back, and return the turns."""
    mine, others = divide_cores(os.sched_getaffinity(0))
    turns: list[Turn] = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        networks = {
            depth: record_network(depth, Path(scratch, str(depth)), language, steps)
            for depth in BLOCKS
        }
        stack.enter_context(on_cores(others))  # for what plays back, too
        urls = {
            depth: stack.enter_context(playing(network.replies))
            for depth, network in networks.items()
        }
        for _ in range(rounds):
            with ExitStack() as processes:
                with on_cores(mine):
                    clients = {
                        depth: processes.enter_context(
                            ClientProcess(language, network.folder, urls[depth])
                        )
                        for depth, network in networks.items()
                    }
                turns += train_round(clients, steps)
    return networks, turns


def summarise(networks: Mapping[int, Network], turns: Sequence[Turn]) -> list[Cost]:
    """Take the medians over the turns, ratios within each turn to its smallest network's."""
    first = min(networks)
    units = {"own": BATCH, "awake": BATCH, "wire": BATCH}
    return [
        Cost(
            depth=depth,
            parameters=networks[depth].parameters,
            wall=networks[depth].wall,
            figures={
                name: statistics.median(turn[depth][name] for turn in turns) / units.get(name, 1)
                for name in SHOWN
            },
            ratios={
                name: statistics.median(turn[depth][name] / turn[first][name] for turn in turns)
                for name in SHOWN
            },
        )
        for depth in sorted(networks)
    ]


def tabulate(costs: Sequence[Cost]) -> Table:
    """Lay out the figures, those of the client with their ratio to ResNet-18's."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (
        "server's body", "parameters", "step", "client's processor / sample",
        "client's wall, not waiting / sample", "client's peak memory", "wire / sample",
    ):  # fmt: skip
        table.add_column(heading, justify="right" if table.columns else "left")
    for cost in costs:
        figures, ratios = cost.figures, cost.ratios
        table.add_row(
            f"ResNet-{cost.depth}",
            f"{cost.parameters / 1e6:.1f} M",
            f"{cost.wall * 1000:.0f} ms  {cost.wall / costs[0].wall:.2f}",
            f"{figures['own'] * 1000:.3f} ms  {ratios['own']:.3f}",
            f"{figures['awake'] * 1000:.3f} ms  {ratios['awake']:.3f}",
            f"{figures['peak'] / 1e6:.1f} MB  {ratios['peak']:.3f}",
            f"{figures['wire'] / 1e3:.1f} kB  {ratios['wire']:.3f}",
        )
    return table


def draw(costs: Sequence[Cost]) -> str:
    """Draw the figures as SVG: five groups of bars, the client's blue, the server's purple."""
    panels = (
        ("client: processor time", "ms a sample", "#0284c7",
         [(c.figures["own"] * 1e3, 2) for c in costs]),
        ("client: wall time", "ms a sample, not waiting", "#0284c7",
         [(c.figures["awake"] * 1e3, 2) for c in costs]),
        ("client: peak memory", "MB", "#0284c7", [(c.figures["peak"] / 1e6, 0) for c in costs]),
        ("server: parameters", "millions", "#9333ea", [(c.parameters / 1e6, 1) for c in costs]),
        ("whole step", "seconds, server included", "#9333ea",
         [(c.wall, 2) for c in costs]),
    )  # fmt: skip
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 300" width="960" height="300" '
        "role=\"img\" font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', "
        'sans-serif" font-size="12" fill="#475569" text-anchor="middle">',
        "  <title>What a step costs the client while the server's body grows from ResNet-18 "
        "to -152</title>",
        '  <rect width="960" height="300" rx="14" fill="#ffffff"/>',
    ]
    for place, (title, unit, colour, values) in enumerate(panels):
        left, top, base = 24 + 186 * place, 84, 244
        lines.append(
            f'  <text x="{left}" y="34" text-anchor="start" font-size="13" font-weight="600" '
            f'fill="#0f172a">{title}</text>\n'
            f'  <text x="{left}" y="52" text-anchor="start">{unit}</text>\n'
            f'  <path d="M{left} {base + 0.5}h170" stroke="#94a3b8"/>'
        )
        largest = max(value for value, _ in values)
        for number, (cost, (value, digits)) in enumerate(zip(costs, values, strict=True)):
            height = (base - top) * value / largest
            x = left + 2 + 34 * number
            lines.append(
                f'  <rect x="{x}" y="{base - height:.1f}" width="30" height="{height:.1f}" rx="2" '
                f'fill="{colour}"/>'
                f'<text x="{x + 15}" y="{base - height - 6:.1f}" fill="#0f172a">'
                f"{value:.{digits}f}</text>"
                f'<text x="{x + 15}" y="{base + 18}">{cost.depth}</text>'
            )
    lines.append('  <text x="480" y="287">depth of the ResNet that is split</text>\n</svg>')
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--client", choices=CLIENTS, default="python", help="in which language")
    parser.add_argument("--rounds", type=int, default=8, help="clients of each network")
    parser.add_argument("--steps", type=int, default=8, help="steps of a client that count")
    parser.add_argument("--plot", type=Path, help="where to write the figures as SVG")
    options = parser.parse_args()
    if not (ROOT / CLIENTS[options.client][1]).exists():
        parser.error("the JavaScript client is not built: `make test-js` builds it")
    load = os.getloadavg()[0]
    costs = summarise(*measure(options.client, options.rounds, options.steps))
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(tabulate(costs))
    print(
        f"client in {options.client}; batch {BATCH}, {SIDE}x{SIDE} images; medians of "
        f"{options.rounds} rounds of {options.steps} steps; each second figure is the ratio to "
        f"ResNet-18's.  Load before: {load:.1f} on {os.cpu_count()} cores"
    )
    if options.plot is not None:
        options.plot.write_text(draw(costs))
    grown = [f"ResNet-{cost.depth}" for cost in costs if not cost.is_constant(DECIDING)]
    if grown:
        print(f"not within {TOLERANCE:.0%} of ResNet-18's time and memory: {', '.join(grown)}")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
