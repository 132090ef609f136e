"""Try many drawn models, and count what came of them.

    python -m tests.support.random_graphs.sweeps --graphs 500 --seed 1

Each seed draws a few models, because Hypothesis varies those that it has drawn.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.support.random_graphs.models import Drawn, models
from tests.support.random_graphs.trials import describe, try_model

EACH = 20
"""Models of a seed."""
SLOPES = 3
"""Every so many models also have their gradients compared, which takes longest."""


@dataclass(kw_only=True)
class Tally:
    """What came of drawn models.

    ``refusals`` and ``remarks`` count sentences without their names and numbers.
    """

    graphs: int = 0
    cut: int = 0
    slopes: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    remarks: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)

    def add(self, drawn: Drawn) -> list[str]:
        """Try a model, count it, and return complaints."""
        self.graphs += 1
        self.cut += drawn.at is not None
        self.operators.update({node.op_type for node in drawn.model.graph.node})
        outcome = try_model(drawn, slopes=self.graphs % SLOPES == 0)
        self.slopes += outcome.slopes
        if outcome.refusal:
            self.refusals[_generalize(outcome.refusal)] += 1
        self.remarks.update(map(_generalize, outcome.remarks))
        return outcome.complaints

    def describe(self) -> list[str]:
        """Describe what came of all, one thing a line."""
        lines = [
            f"{self.graphs} graphs of {len(self.operators)} operators, {self.cut} to cut in two; "
            f"{self.slopes} entries of gradients; {len(self.complaints)} complaints",
            "operators: " + ", ".join(f"{n} {c}" for n, c in sorted(self.operators.items())),
        ]
        lines += [f"refused {count}: {text}" for text, count in self.refusals.most_common()]
        lines += [f"remarked {count}: {text}" for text, count in self.remarks.most_common()]
        return lines + self.complaints


def try_models(graphs: int, first: int, *, is_shrunk: bool) -> Tally:
    """Draw and try models, and stop at the first seed with a complaint if it is to be shrunk."""
    tally = Tally()
    phases = [Phase.generate, Phase.shrink] if is_shrunk else [Phase.generate]

    def try_one(drawn: Drawn) -> None:
        complaints = tally.add(drawn)
        if not complaints:
            return
        text = "\n".join([*complaints, *describe(drawn)])
        if is_shrunk:
            raise AssertionError(text)
        tally.complaints.append(text)

    number = first
    while tally.graphs < graphs:
        count = min(EACH, graphs - tally.graphs)
        quiet = settings(
            max_examples=count, deadline=None, database=None, phases=phases,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        seed(number)(quiet(given(models())(try_one)))()
        number += 1
    return tally


def _generalize(text: str) -> str:
    plain = re.sub(r"\[ONNXRuntimeError\].*", "...", text, flags=re.DOTALL)
    return re.sub(r"\d+(\.\d+)?(e[-+]\d+)?", "#", re.sub(r"'[^']*'", "'...'", plain))


def main(arguments: Sequence[str]) -> int:
    """Print what came of drawn models; return 1 if there is a complaint."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--graphs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shrink", action="store_true")
    chosen = parser.parse_args(arguments)
    logging.getLogger("splitonnx").propagate = False
    tally = try_models(chosen.graphs, chosen.seed, is_shrunk=chosen.shrink)
    print("\n".join(tally.describe()))
    return int(bool(tally.complaints))


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.exit(main(sys.argv[1:]))
