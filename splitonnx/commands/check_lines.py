"""Format the results of the ``check`` command as lines of plain text.

The Rich library is not used here because it takes about a millisecond to format each row of a
table.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from splitonnx.commands.logs import escape
from splitonnx.errors import quote

if TYPE_CHECKING:
    from splitonnx.partitioner.reports.checks import AppliedGroup, Check
    from splitonnx.partitioner.reports.layers import Layer
    from splitonnx.partitioner.reports.memory.estimates import PartyMemory
    from splitonnx.partitioner.reports.remarks import Remark

MOST_ROWS = 40
"""If there are more layers than this, several layers share a row."""
_COLUMNS = ("trained", "frozen", "statistics")


def format_layers(layers: Sequence[Layer], width: int | None) -> Iterator[str]:
    """Yield the lines of a table of layers: elements trained, frozen, and of statistics and states.

    Below each row are the weights that may be trained or frozen by mistake, each with the reason.
    If there are more than ``MOST_ROWS`` layers, they are grouped by the first parts of their names.
    ``width`` is the width at which reasons are wrapped; if it is ``None``, they are not wrapped.
    """
    from splitonnx.manifests import Role

    if not layers:
        return
    groups = _join(layers)
    columns = {
        heading: [f"{sum(layer.count(role) for layer in group):,}" for _, group in groups]
        for heading, role in zip(_COLUMNS, (Role.PARAMETER, Role.FROZEN, Role.BUFFER), strict=True)
    }
    shown = {heading: cells for heading, cells in columns.items() if set(cells) != {"0"}}
    sizes = {heading: max(map(len, (heading, *cells))) for heading, cells in shown.items()}
    indent = " " * (1 + sum(size + 3 for size in sizes.values()))
    yield _row([heading.rjust(size) for heading, size in sizes.items()], "layer")
    labels = [_label(name, group) for name, group in groups]
    longest = max(len(indent) + max(map(len, ("layer", *labels))) - 1, 1)
    yield f" {'-' * min(longest, (width or longest + 1) - 1)}"
    for index, (label, (_, group)) in enumerate(zip(labels, groups, strict=True)):
        cells = [shown[heading][index] for heading in sizes]
        right = [
            ("" if cell == "0" else cell).rjust(size)
            for cell, size in zip(cells, sizes.values(), strict=True)
        ]
        yield _row(right, label)
        for layer in group:
            for weight in layer.weights:
                if weight.doubt is not None:
                    shape = " x ".join(map(str, weight.shape))
                    text = f"? {weight.name} ({shape}): {weight.doubt}"
                    yield from _wrap(text, width, indent, f"{indent}  ")


def format_remarks(remarks: Sequence[Remark], width: int | None) -> Iterator[str]:
    """Yield the lines of the remarks; below each remark are the options of ``cut`` that resolve it.

    ``width`` is the width at which remarks are wrapped; if it is ``None``, they are not wrapped.
    """
    for remark in remarks:
        yield from _wrap(f"remark: {remark.sentence}", width, "", " " * 8)
        for index, option in enumerate(remark.options):
            yield f"{' ' * 8}{'or' if index else 'cut'} {option}"


def format_check(check: Check, path: Path, width: int | None) -> Iterator[str]:
    """Yield the lines for the results of a check, except the table of operators and the verdict.

    ``path`` is the model's file.  ``width`` is the width at which long lines are wrapped; if it is
    ``None``, they are not wrapped.
    """
    from splitonnx.partitioner.reports.remarks import Kind

    yield from format_layers(check.layers, width)
    if check.layers:
        yield ""
    producer = f", by {check.producer}" if check.producer else ""
    yield f"{path}: opset {check.opset}{producer}"
    carried = f"{check.carried:,} in states carried from step to step"
    inner = f"{check.conditional:,} in branches or loops, which stay"
    without = f" ({check.untrained:,} of them get no gradient)" if check.untrained else ""
    yield (
        f"parameters: {check.parameters:,} to train, {check.frozen:,} frozen{without}, "
        f"{check.statistics:,} running statistics{f', {carried}' if check.carried else ''}"
        f"{f', {inner}' if check.conditional else ''}"
    )
    for applied in check.groups:
        yield from _wrap(_describe_group(applied), width, "", " " * 8)
    if not any(remark.kind is Kind.CUTS_NOT_LISTED for remark in check.remarks):
        yield f"single-tensor cuts: {len(check.cuts)} (see splitonnx inspect)"
    if check.losses:
        outputs = "outputs" if len(check.outputs) > 1 else "output"
        yield f"losses that fit {outputs} {quote(check.outputs)}: {', '.join(check.losses)}"
    for memory in check.memory:
        yield from _wrap(_describe_memory(memory), width, "", " " * 8)
    yield from format_remarks(check.remarks, width)
    for obstacle in check.obstacles:
        yield from _wrap(f"in the way: {obstacle}", width, "", " " * 8)


def _describe_memory(memory: PartyMemory) -> str:
    """Describe what a party needs in a step, and what ``--recompute`` changes."""
    from splitonnx.commands.rows import format_bytes

    kept = f"{format_bytes(memory.stash)} kept for the backward stage"
    if memory.stash != memory.stash_recomputed:
        kept += f" ({format_bytes(memory.stash_recomputed)} with --recompute)"
    samples = "sample" if memory.batch == 1 else "samples"
    waiting = [format_bytes(size) for size in (memory.waiting, memory.waiting_recomputed)]
    less = "" if waiting[0] == waiting[1] else f" ({waiting[1]} with --recompute)"
    return (
        f"memory of the {memory.party} for {memory.batch} {samples}: "
        f"{format_bytes(memory.parameters)} of weights, {format_bytes(memory.optimizer)} of "
        f"optimizer state, {format_bytes(memory.gradients)} of gradients, {kept}, "
        f"{format_bytes(memory.wires)} of wires; {waiting[0]} while it waits{less}, and "
        f"{format_bytes(memory.peak)} at its peak, without what kernels need"
    )


def _describe_group(applied: AppliedGroup) -> str:
    """Describe a parameter group: its pattern, its settings and its parameters."""
    group = applied.group
    settings = [f"learning rate x {group.lr_factor:g}"] if group.lr_factor != 1 else []
    if group.weight_decay is not None:
        settings.append(f"weight decay {group.weight_decay:g}")
    count = len(applied.parameters)
    return (
        f"group {group.pattern} ({', '.join(settings) or 'as all others'}): {count} "
        f"{'parameter' if count == 1 else 'parameters'}, {_list(applied.parameters)}"
    )


def _join(layers: Sequence[Layer]) -> list[tuple[str, list[Layer]]]:
    """Group layers by fewer and fewer parts of their names, until there are few enough groups."""
    groups = {layer.name: [layer] for layer in layers}
    depth = max(len(_split(layer.name)) for layer in layers)
    while len(groups) > MOST_ROWS and depth > 1:
        depth -= 1
        groups = {}
        for layer in layers:
            parts = _split(layer.name)
            groups.setdefault("".join(parts[:depth]).rstrip("./"), []).append(layer)
    return list(groups.items())


def _split(name: str) -> list[str]:
    """Split a name after each separator, so that the joined parts are equal to the name."""
    parts = name.replace(".", ".\0").replace("/", "/\0").split("\0")
    return [*parts] if parts[0] not in ("", "/") else ["".join(parts[:2]), *parts[2:]]


def _label(name: str, group: Sequence[Layer]) -> str:
    operators = list(dict.fromkeys(op for layer in group for op in layer.operators))
    own = [weight.name for layer in group for weight in layer.weights]
    told = _list([operator for operator in operators if operator not in name])
    label = f"{name} ({told})" if told else name
    return label if any(weight.startswith(name) for weight in own) else f"{label}: {_list(own)}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _row(cells: Sequence[str], label: str) -> str:
    return f" {'   '.join((*cells, label))}"


def _wrap(text: str, width: int | None, first: str, rest: str) -> Iterator[str]:
    text = escape(" ".join(text.split()))  # it may contain text of the model's file
    if width is None:
        yield f"{first}{text}"
        return
    yield from textwrap.wrap(
        text,
        max(width, 40 + len(rest)),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
