"""What a step costs the device while the server's body grows from ResNet-18 to ResNet-152.

Every network is cut at the end of its first pooling and again at its logits: U-shaped, the client
has the stem, the loss and the labels, the same in all five; ResNet-18 and -34 end in 512 features
and the others in 2048, so a classifier on the client would not be.  A `splitonnx serve` process
each, and for each round a fresh client process (`device_client.py`), which measures itself.  The
networks take turns, forwards and backwards, so that a drifting machine strikes all alike; ratios
are to the same round's ResNet-18, and their median over the rounds counts.  Exit code 1 where the
client's processor time per sample or its peak memory leaves ResNet-18's by more than 10 %.

The wall time that is not spent waiting for the server is shown but decides nothing: here the server
shares the cores, and updates its weights while the client goes on.  Data are random.  For Linux.

    python benchmarks/device_cost.py [--rounds 3] [--steps 6] [--plot docs/device_cost.svg]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from resnets import BLOCKS, build_resnet, serve
from rich import box
from rich.console import Console
from rich.table import Table

from splitonnx.partitioner.partitions import cut

SIDE = 64
"""Pixels of an image's side."""
BATCH = 16
WARM_UP = 2
"""Steps of a client that do not count."""
TOLERANCE = 0.10
"""Largest part by which the client's cost may differ from that at ResNet-18."""
SHOWN = ("own", "idle_free", "peak", "wire", "wall")
"""What a client measures, see ``device_client.py``; the first and the third decide."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A network's figures: medians over the rounds, ``ratios`` of them to ResNet-18's.

    Times are seconds a sample, ``wall`` a step; ``peak`` is in bytes, ``wire`` in bytes a sample;
    ``parameters`` are the server's.
    """

    depth: int
    parameters: int
    figures: Mapping[str, float]
    ratios: Mapping[str, float]

    @property
    def is_constant(self) -> bool:
        """Whether time and memory are ResNet-18's, within the tolerance."""
        return all(abs(self.ratios[name] - 1) <= TOLERANCE for name in ("own", "peak"))


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


def measure_client(folder: Path, url: str, steps: int) -> dict[str, float]:
    """Train with a client process of its own; return its figures, of which times are medians."""
    script = Path(__file__).with_name("device_client.py")
    sizes = map(str, (BATCH, SIDE, WARM_UP, steps))
    command = [sys.executable, str(script), str(folder), url, *sizes]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    return {
        "own": statistics.median(found["own"]) / BATCH,
        "idle_free": statistics.median(found["idle_free"]) / BATCH,
        "wall": statistics.median(found["wall"]),
        "peak": found["peak"],
        "wire": found["wire"] / BATCH,
    }


def compare(rounds: int, steps: int) -> list[Cost]:
    """Cut, serve and train every network, round after round."""
    depths = list(BLOCKS)
    found: dict[int, list[dict[str, float]]] = {depth: [] for depth in depths}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folders = {depth: Path(scratch, str(depth)) for depth in depths}
        parameters = {depth: cut_network(depth, folders[depth]) for depth in depths}
        urls = {depth: stack.enter_context(serve(folders[depth] / "server")) for depth in depths}
        for number in range(rounds):
            for depth in depths if number % 2 == 0 else reversed(depths):
                found[depth].append(measure_client(folders[depth] / "client", urls[depth], steps))
    first = found[depths[0]]
    return [
        Cost(
            depth=depth,
            parameters=parameters[depth],
            figures={name: statistics.median(one[name] for one in own) for name in SHOWN},
            ratios={
                name: statistics.median(
                    one[name] / base[name] for one, base in zip(own, first, strict=True)
                )
                for name in SHOWN
            },
        )
        for depth, own in found.items()
    ]


def tabulate(costs: Sequence[Cost]) -> Table:
    """Lay out the figures, those of the client with their ratio to ResNet-18's."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (
        "server's body", "parameters", "step", "client's processor / sample",
        "client's wall / sample", "client's peak memory", "wire / sample",
    ):  # fmt: skip
        table.add_column(heading, justify="right" if table.columns else "left")
    for cost in costs:
        figures, ratios = cost.figures, cost.ratios
        table.add_row(
            f"ResNet-{cost.depth}",
            f"{cost.parameters / 1e6:.1f} M",
            f"{figures['wall'] * 1000:.0f} ms  {ratios['wall']:.2f}",
            f"{figures['own'] * 1000:.3f} ms  {ratios['own']:.3f}",
            f"{figures['idle_free'] * 1000:.3f} ms  {ratios['idle_free']:.3f}",
            f"{figures['peak'] / 1e6:.1f} MB  {ratios['peak']:.3f}",
            f"{figures['wire'] / 1e3:.1f} kB  {ratios['wire']:.3f}",
        )
    return table


def draw(costs: Sequence[Cost]) -> str:
    """Draw the figures as SVG: four groups of bars, the client's blue, the server's purple."""
    panels = (
        ("client: processor time", "ms a sample", "#0284c7",
         [(c.figures["own"] * 1e3, 2) for c in costs]),
        ("client: peak memory", "MB", "#0284c7", [(c.figures["peak"] / 1e6, 0) for c in costs]),
        ("server: parameters", "millions", "#9333ea", [(c.parameters / 1e6, 1) for c in costs]),
        ("whole step", "seconds, server included", "#9333ea",
         [(c.figures["wall"], 2) for c in costs]),
    )  # fmt: skip
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 880 300" width="880" height="300" '
        "role=\"img\" font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', "
        'sans-serif" font-size="12" fill="#475569" text-anchor="middle">',
        "  <title>While the server's body grows from ResNet-18 to -152, the client's time and "
        "memory stay the same</title>",
        '  <rect width="880" height="300" rx="14" fill="#ffffff"/>',
    ]
    for place, (title, unit, colour, values) in enumerate(panels):
        left, top, base = 24 + 212 * place, 84, 244
        lines.append(
            f'  <text x="{left}" y="34" text-anchor="start" font-size="13" font-weight="600" '
            f'fill="#0f172a">{title}</text>\n'
            f'  <text x="{left}" y="52" text-anchor="start">{unit}</text>\n'
            f'  <path d="M{left} {base + 0.5}h196" stroke="#94a3b8"/>'
        )
        largest = max(value for value, _ in values)
        for number, (cost, (value, digits)) in enumerate(zip(costs, values, strict=True)):
            height = (base - top) * value / largest
            x = left + 3 + 39 * number
            lines.append(
                f'  <rect x="{x}" y="{base - height:.1f}" width="34" height="{height:.1f}" rx="2" '
                f'fill="{colour}"/>'
                f'<text x="{x + 17}" y="{base - height - 6:.1f}" fill="#0f172a">'
                f"{value:.{digits}f}</text>"
                f'<text x="{x + 17}" y="{base + 18}">{cost.depth}</text>'
            )
    lines.append('  <text x="440" y="287">depth of the ResNet that is split</text>\n</svg>')
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3, help="clients of each network")
    parser.add_argument("--steps", type=int, default=6, help="steps of a client that count")
    parser.add_argument("--plot", type=Path, help="where to write the figures as SVG")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    costs = compare(options.rounds, options.steps)
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(tabulate(costs))
    print(
        f"batch {BATCH}, {SIDE}x{SIDE} images, medians of {options.rounds} rounds of "
        f"{options.steps} steps; each second figure is the ratio to ResNet-18's.  Load of the "
        f"machine before: {load:.1f} on {os.cpu_count()} cores"
    )
    if options.plot is not None:
        options.plot.write_text(draw(costs))
    grown = [f"ResNet-{cost.depth}" for cost in costs if not cost.is_constant]
    if grown:
        print(f"not within {TOLERANCE:.0%} of ResNet-18's time and memory: {', '.join(grown)}")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
