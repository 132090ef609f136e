"""Format the cells of tables, and long tables as plain lines.

The Rich library is not used for long tables, because it takes about a millisecond to format each
row.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from splitonnx.expressions import describe_size

if TYPE_CHECKING:
    from splitonnx.partitioner.reports.inspections import CutCandidate

FEW_ROWS = 500
"""The Rich library prints tables of up to this many rows; it wraps text to fit the terminal."""

_MINUTE, _HOUR = 60, 3600


def format_rows(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: int
) -> Iterator[str]:
    """Yield the lines of a table.

    The first ``left`` columns are left-aligned, and the others are right-aligned.
    """
    columns = zip(headings, *rows, strict=True)
    widths = [max(len(cell) for cell in column) for column in columns]

    def line(cells: Sequence[str]) -> str:
        pairs = zip(cells, widths, strict=True)
        padded = (
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(pairs)
        )
        return " " + "   ".join(padded).rstrip()

    yield line(headings)
    yield " " + "-" * (sum(widths) + 3 * (len(widths) - 1))
    yield from map(line, rows)


def list_cells(cut: CutCandidate) -> Sequence[str]:
    """Return the table cells for one cut."""
    return (
        " + ".join((cut.tensor, *cut.sent)) + _mark_raw(cut),
        cut.op,
        " x ".join("?" if dim is None else describe_size(str(dim)) for dim in cut.shape),
        format_bytes(cut.bytes_up),
        format_bytes(cut.bytes_down),
        f"{cut.client_parameters:,}",
        f"{cut.server_parameters:,}",
    )


def _mark_raw(cut: CutCandidate) -> str:
    """Return the options without which ``cut`` refuses this cut, in parentheses."""
    options = " ".join(f"--send-input {shlex.quote(name)}" for name in cut.raw)
    return f" ({options})" if options else ""


def describe_no_cuts(advised: Sequence[Sequence[str]]) -> str:
    """Return a sentence for a model that cannot be cut at any single tensor.

    ``advised`` lists alternatives.  Each is a list of raw inputs: if the client also sends these
    inputs, the model can be cut.  The sentence names the options of ``inspect`` that list these
    cuts.
    """
    options = " or ".join(
        " ".join(f"--with {shlex.quote(name)}" for name in names) for names in advised
    )
    hint = f"; {options} lists cuts where this raw input crosses as well" if options else ""
    return f"no single tensor divides the model{hint}; --u-shape lists pairs of tensors"


def format_age(seconds: float | None, otherwise: str) -> str:
    """Format how long ago something was, such as ``5 min ago``; ``None`` becomes ``otherwise``."""
    if seconds is None:
        return otherwise
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s ago"
    if seconds < 2 * _HOUR:
        return f"{seconds / _MINUTE:.0f} min ago"
    return f"{seconds / _HOUR:.0f} h ago"


def format_bytes(size: int | None) -> str:
    """Format a number of bytes with a unit, such as ``1.2 MB``; ``None`` becomes ``?``."""
    from rich.filesize import decimal

    return "?" if size is None else decimal(size)
