"""The table of what was seen."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from tests.attacks.verdicts import Attack, Outcome


@dataclass(frozen=True, kw_only=True)
class Row:
    """One attack that was carried out."""

    attack: Attack
    outcome: Outcome
    seconds: float

    @property
    def verdict(self) -> str:
        return "held" if self.outcome.held else "FELL"


def print_row(row: Row) -> None:
    """Tell one attack as soon as it is over."""
    print(
        f"{row.attack.fault:>3}  {row.verdict}  {row.attack.name}: {row.outcome.seen} "
        f"({row.seconds:.0f} s)",
        flush=True,
    )


def print_table(rows: Sequence[Row]) -> None:
    """Print all of them side by side."""
    widths = (5, 30, 52, 34, 7)
    print()
    _print_cells(("", "fault", "seen", "right", "verdict"), widths)
    print("  ".join("-" * width for width in widths))
    for row in rows:
        attack = row.attack
        cells = (attack.fault, attack.name, row.outcome.seen, attack.right, row.verdict)
        _print_cells(cells, widths)
    fallen = sum(not row.outcome.held for row in rows)
    seconds = sum(row.seconds for row in rows)
    print(f"\n{len(rows)} attacks in {seconds:.0f} s: {len(rows) - fallen} held, {fallen} fell")


def _print_cells(cells: Sequence[str], widths: Sequence[int]) -> None:
    pairs = tuple(zip(cells, widths, strict=True))
    wrapped = [textwrap.wrap(cell, width) or [""] for cell, width in pairs]
    for number in range(max(map(len, wrapped))):
        line = [lines[number] if number < len(lines) else "" for lines in wrapped]
        padded = (f"{part:<{width}}" for part, width in zip(line, widths, strict=True))
        print("  ".join(padded).rstrip())
