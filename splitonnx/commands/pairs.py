"""Print the pairs of tensors that ``inspect`` lists for a U-shape, and explain why these are shown.

A pair consists of the tensors at which the client's head ends, and the tensors at which its tail
begins.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from splitonnx.commands import printing
from splitonnx.commands.logs import escape
from splitonnx.commands.rows import format_bytes

if TYPE_CHECKING:
    from splitonnx.partitioner.reports.u_shapes.pairs import PairCandidate

NAMES = ("at", "tail at")
SIZES = ("up / sample", "down / sample", "client params", "server params")
"""The headings of the table; the columns of ``SIZES`` are right-aligned."""

LABELS_MARK = " (tells labels)"
"""The mark of a pair that ``cut`` takes only with ``--send-labels`` or ``--send-input``."""


def print_pairs(pairs: Sequence[PairCandidate], *, is_end_named: bool) -> None:
    """Print a table of pairs at which the model can be cut in a U-shape.

    ``is_end_named`` means that the user named tensors with ``--at`` or ``--tail-at``.  Otherwise,
    only recommended pairs are printed, if there are any.
    """
    shown = choose_pairs(pairs, is_end_named=is_end_named)
    if shown:
        printing.print_rows(NAMES, SIZES, [list_pair_cells(pair) for pair in shown])
    sentence = describe_choice(pairs, is_end_named=is_end_named)
    if sentence is not None:
        print(escape(sentence))
    if any(pair.tells_labels for pair in shown):
        options = _list_options(shown)
        print(
            f"{LABELS_MARK.strip()}: the client has no layer of weights behind this tail, so the "
            f"server could compute the labels from its gradient; cut asks for {options}"
        )


def _list_options(pairs: Sequence[PairCandidate]) -> str:
    """List what ``cut`` asks for: the labels of a loss within the model are inputs of it."""
    names = dict.fromkeys(name for pair in pairs for name in pair.tells_inputs)
    return " ".join(f"--send-input {shlex.quote(name)}" for name in names) or "--send-labels"


def choose_pairs(pairs: Sequence[PairCandidate], *, is_end_named: bool) -> Sequence[PairCandidate]:
    """Return the pairs to show in a table.

    Only recommended pairs are shown, unless no pair is recommended or the user named tensors with
    ``--at`` or ``--tail-at``.
    """
    recommended = [pair for pair in pairs if pair.recommended]
    return pairs if is_end_named or not recommended else recommended


def list_pair_cells(pair: PairCandidate) -> Sequence[str]:
    """Return the table cells for one pair."""
    client = pair.head_parameters + pair.tail_parameters
    return (
        " + ".join(pair.at),
        " + ".join(pair.tail_at) + (LABELS_MARK if pair.tells_labels else ""),
        format_bytes(pair.bytes_up),
        format_bytes(pair.bytes_down),
        f"{client:,} ({pair.client_share:.0%})",
        f"{pair.server_parameters:,} ({1 - pair.client_share:.0%})",
    )


def describe_choice(pairs: Sequence[PairCandidate], *, is_end_named: bool) -> str | None:
    """Explain in one sentence why the table shows these pairs, or no pairs.

    Return ``None`` if the table shows all pairs for the tensors that the user named with ``--at``
    or ``--tail-at``.
    """
    if not pairs:
        other = " with the end that is named" if is_end_named else ""
        return f"no pair of tensors{other} divides the model for a U-shape"
    if is_end_named:
        return None
    shown = sum(pair.recommended for pair in pairs)
    if shown:
        return (
            f"{shown} of {len(pairs):,} pairs; each of the others trains nothing at one end or at "
            "the server, or sends no fewer bytes than one of these and leaves the client no fewer "
            "of the weights.  --at NAME lists every tail that fits it, and --json lists all pairs"
        )
    if any(pair.bytes_up is None or pair.bytes_down is None for pair in pairs):
        return "a size is not known, so no pair can be recommended; --dim NAME=SIZE fixes it"
    return "no pair can be recommended: none trains parameters at both ends and at the server"
