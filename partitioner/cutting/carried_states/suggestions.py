"""Find outputs and inputs whose names and shapes suggest that a model hands itself a state.

Examples are ``h_n`` and ``h_0``, ``stateN`` and ``state``, and ``new_cell`` and ``cell``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from splitonnx.manifests import Role
from splitonnx.partitioner.cutting.preparations import PreparedModel

_NEXT = (
    re.compile(r"(?P<stem>.*[^_.])[_.]?(?:next|new|out|N)"),
    re.compile(r"(?P<stem>.*[^_.])[_.]n"),
    re.compile(r"(?P<stem>h|c|hx|cx|hidden|cell|state|mem|memory)[_.]?[n1]"),
    re.compile(r"(?:next|new|out|present)[_.](?P<stem>.+)"),
)
"""Forms of the name of an output that replaces a state."""
_NOW = (
    re.compile(r"(?P<stem>.*[^_.])[_.]?(?:prev|old|in|init)"),
    re.compile(r"(?P<stem>.*[^_.])[_.]0"),
    re.compile(r"(?P<stem>h|c|hx|cx|hidden|cell|state|mem|memory)[_.]?0"),
    re.compile(r"(?:prev|old|in|past|init|initial)[_.](?P<stem>.+)"),
    re.compile(r"(?P<stem>.+)"),
)
"""Forms of the name of an input that holds a state; the last is a plain name."""


def find_likely_states(prepared: PreparedModel, output: str) -> list[tuple[str, str]]:
    """Return pairs of an output and the input that it probably replaces in the next step.

    A pair has equal types, shapes that may be equal, and names of which one clearly follows the
    other.  An output or input with several candidates is left out, as are states that the user
    named and ``output``, from which the loss is computed.
    """
    graph = prepared.skeleton.graph
    named = {name for pair in prepared.states for name in pair}
    inputs = [value for value in graph.inputs if value.name not in prepared.state and value.uses()]
    inputs += [value for value in prepared.stored_inputs if value.name not in named]
    outputs = [v for v in graph.outputs if v.name not in named and v.name != output]
    found = [
        (made.name or "", value.name or "")
        for made in outputs
        for value in inputs
        if _follows(made.name or "", value.name or "") and _may_replace(made, value)
    ]
    uses = Counter(name for pair in found for name in pair)
    return [pair for pair in found if all(uses[name] == 1 for name in pair)]


def find_overlooked_states(prepared: PreparedModel, output: str) -> list[tuple[str, str]]:
    """Return those likely states that are weights or constants, as the file has a value for them.

    States that the user binds, or whose names match what is to be trained or frozen, are left out.
    """
    stored = {value.name for value in prepared.stored_inputs} - prepared.adjustments.bindings.keys()
    decided = (*prepared.train, *prepared.freeze)
    return [
        (made, source)
        for made, source in find_likely_states(prepared, output)
        if source in stored and not any(re.search(pattern, source) for pattern in decided)
    ]


def describe_overlooked_states(prepared: PreparedModel, output: str) -> Iterator[str]:
    """Yield a sentence about each likely state that is a weight or a constant without --state."""
    for made, source in find_overlooked_states(prepared, output):
        is_trained = prepared.roles.get(source) is Role.PARAMETER
        yield (
            f"'{source}' looks like a state that output '{made}' replaces in each step, but is "
            f"{'trained as a weight' if is_trained else 'a constant'}, since the file has a value "
            f"for it; --state {made}={source} carries it, --freeze or --train decides otherwise"
        )


def _follows(output: str, source: str) -> bool:
    """Return whether the names are those of one state, after a step and before it."""
    after = {match["stem"] for form in _NEXT if (match := form.fullmatch(output))}
    before = {match["stem"] for form in _NOW if (match := form.fullmatch(source))}
    return bool(after & before)


def _may_replace(made: ir.Value, value: ir.Value) -> bool:
    if made.dtype != value.dtype or made.shape is None or value.shape is None:
        return False
    if len(made.shape) != len(value.shape):
        return False
    return all(
        one == other or isinstance(one, int) != isinstance(other, int) or _is_open(one, other)
        for one, other in zip(made.shape, value.shape, strict=True)
    )


def _is_open(*sizes: int | ir.SymbolicDim) -> bool:
    """Return whether one of two sizes is not known; two sizes with names are different."""
    return any(isinstance(size, ir.SymbolicDim) and size.value is None for size in sizes)
