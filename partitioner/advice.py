"""Advise which tensors to cut at, after a cut was refused.

Each advised cut was tried and is legal, and its tensors are all in the user's model.  Whether the
user permits raw inputs and labels to be sent is not considered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

import onnx_ir as ir

from splitonnx.errors import CutError, NotACut, TooManyTries, UsageError, count_some, quote
from splitonnx.partitioner.cutting.candidates.bisections import find_bisections
from splitonnx.partitioner.cutting.carried_states.placements import place_states
from splitonnx.partitioner.cutting.divisions import divide_inference, divide_training
from splitonnx.partitioner.cutting.passes.given_names import resolve_names
from splitonnx.partitioner.cutting.ports import declare, insert_ports
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.readings import copy_model
from splitonnx.partitioner.inference.undecided_sizes import is_setting

_MOST_ROUNDS = 4
"""Limit on how often further tensors are added to a cut before giving up."""
_MOST_TRIES = 8
"""Limit of tensors that are tried before, and again after, the refused tensor."""

_Cut = tuple[Sequence[str], Sequence[str]]
"""The names of the tensors that the client sends, and of those that the server sends back."""


@attribute_errors_to_pass("searched for cuts near the one refused")
def add_advice(
    error: NotACut,
    prepared: PreparedModel,
    at: Sequence[str],
    tail_at: Sequence[str],
    outputs: Sequence[str],
) -> NotACut:
    """Return a copy of the error for a refused cut, with advice on legal cuts added.

    All advised cuts have been tried.  ``at`` and ``tail_at`` name the refused tensors, and
    ``output`` the output from which the loss is computed.  In the returned error, ``missing`` names
    all tensors that must be added to make the cut legal.  It is empty if adding tensors does not
    make the cut legal, or if one of them is not in the user's model.  ``settings`` names the added
    raw inputs that may be settings.  ``others`` names tensors that are legal in place of ``at``.
    """
    others = list(_find_others(prepared, (at, tail_at), outputs))
    if not error.missing:
        return replace(error, others=others)
    for is_back in (False, True) if tail_at else (False,):
        added = _complete(error, prepared, (at, tail_at), outputs, is_back)
        if added is not None:
            settings = _list_settings(prepared, added.raw)
            return replace(added, tensors=error.tensors, others=others, settings=settings)
    own = [name for name in error.missing if name in prepared.given]
    crossing = count_some(own, most=8) or "other tensors"
    source = f" (of the raw input {quote(error.raw)}, which stays home)" if error.raw else ""
    reason = f"{crossing} would cross too{source}"
    return NotACut(error.tensors, reason=reason, others=others)


def _list_settings(prepared: PreparedModel, raw: Sequence[str]) -> list[str]:
    """List the raw inputs that may be settings, which do not cross if they are bound to a value."""
    inputs = {value.name: value for value in prepared.inference.graph.inputs}
    return [name for name in raw if name in inputs and is_setting(inputs[name])]


def _complete(
    error: NotACut, prepared: PreparedModel, cut: _Cut, outputs: Sequence[str], is_back: bool
) -> NotACut | None:
    """Add the tensors that must cross too, until the cut is legal.

    Return the error with all added tensors, or ``None`` if the cut cannot be completed.  The
    tensors are added to those that the server sends back if ``is_back`` is set.
    """
    at, tail_at = cut
    missing, raw = list(error.missing), list(error.raw)
    for _ in range(_MOST_ROUNDS):
        if not prepared.given.issuperset(missing):
            return None
        cut = (at, [*tail_at, *missing]) if is_back else ([*at, *missing], tail_at)
        refusal = _try(prepared, cut, outputs)
        if refusal is None:
            return replace(error, missing=missing, raw=raw, is_back=is_back)
        if not isinstance(refusal, NotACut) or not set(refusal.missing) - set(missing):
            return None
        missing = list(dict.fromkeys([*missing, *refusal.missing]))
        raw = list(dict.fromkeys([*raw, *refusal.raw]))
    return None


def _try(
    prepared: PreparedModel, cut: _Cut, outputs: Sequence[str]
) -> CutError | UsageError | None:
    """Divide both forms of a model, and return the error that refuses this, if there is one."""
    at, tail_at = cut
    try:
        for is_training in (True, False):
            form = prepared.training if is_training else prepared.inference
            graph = copy_model(form).graph
            partition = (
                divide_training(prepared, graph, at, tail_at, outputs)
                if is_training
                else divide_inference(prepared, graph, at, tail_at)
            )
            if is_training:
                partition = place_states(prepared, graph, partition).partition
            for port in insert_ports(graph, partition, partition.server):
                declare(port.value)
    except (CutError, UsageError) as error:
        return error
    return None


def _find_others(prepared: PreparedModel, cut: _Cut, outputs: Sequence[str]) -> Iterator[str]:
    """Find the nearest tensors, before and after the refused ones, that divide the model."""
    at, tail_at = cut
    graph = prepared.inference.graph
    order = {value: place for place, value in enumerate(_list_values(graph))}
    refused = resolve_names(graph, at, prepared.given)
    first = min((order.get(value, 0) for value in refused), default=0)
    elements = {name: prepared.weights[name].size for name in prepared.trainable}
    found = []
    with suppress(TooManyTries):
        found = find_bisections(graph, state=prepared.state, trainable=elements)
    single = [each.at[0] for each in found if each.at[0].name in prepared.given]
    places = [(value.name or "", order[value]) for value in single if value not in refused]
    before = [name for name, place in reversed(places) if place < first]
    after = [name for name, place in places if place > first]
    for names in (before, after):
        for name in names[:_MOST_TRIES]:
            if _try(prepared, ([name], tail_at), outputs) is None:
                yield name
                break


def _list_values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *(value for node in graph for value in node.outputs)]
