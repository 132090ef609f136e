"""Have a finished bundle's backward stages compute again what forward stages would have kept.

The forward stage of training runs a second time once the gradients have arrived that its backward
stage waits for.  It is the same graph with the same inputs and the same random key, so it computes
the same bits, also where it draws random masks, takes a batch's own statistics or encodes what it
sends.  The first run then hands on only what is sent, what replaces state, and what a stage before
the backward stage reads.  Nothing is sent or committed twice.  What was decoded to be read by the
forward stage is decoded again, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from splitonnx.bundles import Bundle
from splitonnx.errors import UsageError
from splitonnx.manifests import Phase, Stage, WireKind
from splitonnx.names import ACCUMULATE, CLIENT, SERVER, TRAIN, Recompute
from splitonnx.partitioner.cutting.transforms.replacements import replace_parties, replace_phase
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What runs again in a phase of a party.

    ``again`` are the places of these stages, the last of which is the forward stage, and ``before``
    is that of the backward stage.  ``values`` are what the backward stage, and those after it, read
    of the forward stage, and ``after`` the gradients that the backward stage waits for.
    """

    again: tuple[int, ...]
    before: int
    values: frozenset[str]
    after: tuple[str, ...]


@attribute_errors_to_pass("changed so that it computes its forward stages again")
def recompute_stages(bundle: Bundle, recompute: Recompute | bool) -> Bundle:
    """Return a bundle in which a party, or both, compute forward stages again.

    Raises:
        UsageError: no such party keeps anything that it could compute again.
    """
    wanted = _list_parties(recompute)
    parties = dict(bundle.parties)
    found: list[str] = []
    for name in (name for name in wanted if name in parties):
        for label in (TRAIN, ACCUMULATE):
            phase = parties[name].manifest.phase(label)
            plan = _plan(phase, name)
            if plan is not None:
                parties[name] = replace_phase(parties[name], _repeat(phase, plan), {})
                found.append(name)
    if not wanted:
        return bundle
    if not found:
        raise UsageError(_explain(bundle, wanted))
    told = tuple(name for name in wanted if name in found)
    return replace_parties(
        bundle, parties, msgspec.structs.replace(bundle.manifest.recipe, recompute=told)
    )


def _list_parties(recompute: Recompute | bool) -> tuple[str, ...]:
    """List the parties that compute their forward stage again; ``True`` means both.

    Raises:
        UsageError: the value names no party.
    """
    if isinstance(recompute, bool):
        return (CLIENT, SERVER) if recompute else ()
    if recompute == "both":
        return (CLIENT, SERVER)
    if recompute not in (CLIENT, SERVER):
        raise UsageError(f"recompute must be client, server, both or a bool, not {recompute!r}")
    return (recompute,)


def _explain(bundle: Bundle, wanted: Sequence[str]) -> str:
    """Say why none of these parties has anything to compute again."""
    option = f"--recompute {wanted[0] if len(wanted) == 1 else 'both'}"
    if SERVER not in bundle.parties:
        return (
            f"{option}: the model is not cut, so one stage computes forward and backward; leave it "
            "out"
        )
    if wanted == (SERVER,) and not bundle.manifest.recipe.tail_at:
        return (
            f"{option}: in a cut without --tail-at the server has the loss and computes forward "
            "and backward in one stage, so it keeps nothing in between; choose client, or leave it "
            "out"
        )
    whose = " and ".join(f"the {name}'s" for name in wanted)
    verb = "part keeps" if len(wanted) == 1 else "parts keep"
    return (
        f"{option}: {whose} {verb} nothing from a forward stage for a backward stage, as they have "
        "no trained parameter there, or need no more than its inputs; leave it out"
    )


def _plan(phase: Phase, party: str) -> _Plan | None:
    """Find what can be computed again in a phase, if anything can."""
    decoded = {one.tensor.name: one for one in phase.list_encoded() if one.receiver == party}
    carriers = {name for one in decoded.values() for name in one.wires}
    gradients = {n for n, one in decoded.items() if one.kind is WireKind.GRADIENT}
    gradients |= {
        wire.tensor.name
        for wire in phase.wires
        if wire.kind is WireKind.GRADIENT and wire.receiver == party
    } - carriers
    stages = phase.stages
    computing = [i for i, stage in enumerate(stages) if not decoded.keys() >= set(stage.outputs)]
    waiting = [i for i in computing if gradients & _list_read(stages[i])]
    if not waiting or waiting[0] == computing[0]:
        return None
    first, before = computing[0], waiting[0]
    kept = {*phase.results, *phase.commits.values()}
    read = {name for stage in stages[before:] for name in _list_read(stage)}
    values = read & set(stages[first].outputs) - kept
    if not values or set(phase.results) & set(stages[first].outputs):
        return None
    needed = _list_read(stages[first])
    return _Plan(
        again=(*(i for i in range(first) if needed & set(stages[i].outputs)), first),
        before=before,
        values=frozenset(values),
        after=tuple(i.name for i in stages[before].inputs if i.name in gradients),
    )


def _list_read(stage: Stage) -> set[str]:
    return {entry.name for entry in stage.inputs}


def _repeat(phase: Phase, plan: _Plan) -> Phase:
    """Return the phase with stages that run again right before the backward stage."""
    stages = list(phase.stages)
    first = plan.again[-1]
    sent = {wire.tensor.name for wire in phase.wires}
    meanwhile = {name for stage in stages[: plan.before] for name in _list_read(stage)}
    part = stages[first].name.partition(".")[0]
    again = [
        msgspec.structs.replace(
            stages[index],
            name=f"{part}.recompute{'' if index == first else '.decode'}",
            outputs=tuple(n for n in stages[index].outputs if index != first or n in plan.values),
            after=plan.after,
        )
        for index in plan.again
    ]
    stages[first] = msgspec.structs.replace(
        stages[first],
        outputs=tuple(
            n for n in stages[first].outputs if n not in plan.values or n in sent | meanwhile
        ),
    )
    stages[plan.before : plan.before] = again
    return msgspec.structs.replace(phase, stages=tuple(stages))
