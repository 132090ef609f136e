"""The ``explain`` command, and what ``cut`` and ``train`` print about the tensors that are sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import splitonnx
from splitonnx.commands import printing
from splitonnx.commands.logs import escape
from splitonnx.commands.options import JsonOption
from splitonnx.names import EVALUATE, OWN, PREDICT, SHARE, TRAIN

if TYPE_CHECKING:
    from splitonnx.disclosures import Sending
    from splitonnx.manifests import PartyManifest
    from splitonnx.runtime.channels.greetings import SharingTerms
    from splitonnx.runtime.client.datasets import Dataset
    from splitonnx.runtime.client.explanations import (
        ArrayExplanation,
        Explanation,
        PhaseExplanation,
    )

BESIDES = (
    "beside these tensors, messages hold their session, phase, step, micro-batch and turn, the "
    "seed, the learning rate, and names, types and shapes of tensors; the greeting holds the "
    "bundle's digest, the steps of checkpoints, the declarations above, and a token if there is one"
)


def explain(
    source: Annotated[Path, typer.Argument(help="The client's folder.")],
    batch: Annotated[
        int | None, typer.Option(min=1, help="Batch size, to know bytes where it is dynamic.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Explain which tensors the client sends and receives, with a proof from the client's graphs.

    The client's arrays are its raw inputs and the labels.  For each array, the output lists the
    sent tensors that depend on it and the first layers with weights in between, or states that no
    sent tensor depends on it.
    """
    found = splitonnx.explain(source, batch=batch)
    if as_json:
        printing.print_json(summarize_explanation(found))
        return
    for line in list_lines(found):
        print(escape(line))


def summarize_sending(sending: Sending) -> dict[str, Any]:
    """Return a dictionary that describes what is sent per step, including the size in bytes."""
    import msgspec

    return {**msgspec.to_builtins(sending), "bytes": sending.bytes}


def summarize_explanation(explanation: Explanation) -> dict[str, Any]:
    """Return a dictionary that explains what a client sends and receives, with the proof."""
    import msgspec

    return {
        "digest": explanation.digest,
        "phases": [
            {
                "phase": phase.leaves.phase,
                "leaves": summarize_sending(phase.leaves),
                "arrives": summarize_sending(phase.arrives),
                "stages": phase.stages,
                "kept": phase.kept,
                "arrays": [
                    {
                        **msgspec.to_builtins(array),
                        "sentences": [sentence for _, sentence in _list_sentences(array)],
                    }
                    for array in phase.arrays
                ],
            }
            for phase in explanation.phases
        ],
        "raw_states": explanation.raw_states,
        "besides": BESIDES,
    }


def list_lines(explanation: Explanation) -> Iterator[str]:
    """Yield an explanation as lines of text."""
    for phase in explanation.phases:
        rows = "" if phase.leaves.batch is None else f" of {phase.leaves.batch:,}"
        if phase.leaves.phase == SHARE:
            yield from _list_shared(phase)
            continue
        then = ", after predicting" if phase.leaves.phase == EVALUATE else ""
        yield f"{phase.leaves.phase}, per step{rows}{then}"
        yield f"  leaves: {phase.leaves}"
        yield f"  comes in: {phase.arrives}"
        for array in phase.arrays:
            for subject, sentence in _list_sentences(array):
                yield f"  {subject}: {sentence}"
        stays = f"{phase.kept:,} other values that they make stay here"
        yield f"  proof: the graphs of {', '.join(phase.stages)}; {stays}"
    for sentence in explanation.kept:
        yield f"the client {sentence}"
    yield BESIDES


def _list_shared(phase: PhaseExplanation) -> Iterator[str]:
    """Yield what the client sends if its user permits it and the server's policy asks for it."""
    yield f"{phase.leaves.phase}, per round, only with --share and a policy that joins clients"
    yield f"  leaves: {_describe_shared(phase.leaves)}"
    yield "  comes in: the joined ones in their place"


def _list_sentences(array: ArrayExplanation) -> Iterator[tuple[str, str]]:
    from splitonnx.disclosures import LABELS

    subject = f"{array.kind} '{array.name}' {array.declared}"
    for way in array.ways:
        is_told = way.tensor.tells_labels or way.dependence.tells_values
        tells = array.kind == LABELS and not way.is_itself and is_told
        yield subject, f"{way}{', so the server can compute the labels from it' if tells else ''}"
    if not array.ways:
        yield subject, "stays here: no path leads from it to anything that leaves"
    if array.updates:
        yield (
            subject,
            f"a step changes {array.updates:,} weights and statistics here by it, and what later "
            "steps send depends on these",
        )


def summarize_steps(manifest: PartyManifest) -> dict[str, Any]:
    """Return a dictionary of what leaves the client per step, for training and for prediction."""
    from splitonnx.disclosures import list_sent

    return {phase: summarize_sending(list_sent(manifest, phase)) for phase in (TRAIN, PREDICT)}


def print_steps(manifest: PartyManifest) -> None:
    """Print what leaves the client in each step of training and of prediction."""
    from splitonnx.disclosures import describe_raw_states, describe_step, list_sent

    for phase in (TRAIN, PREDICT):
        print(escape(describe_step(list_sent(manifest, phase))))
    for sentence in describe_raw_states(manifest):
        print(escape(f"the client {sentence}"))


class RunDisclosure:
    """A description of what leaves the client during a training run, per step and in total.

    ``data`` are the training data.  ``held_out`` are the data for evaluation after each epoch, or
    ``None`` if the run has no evaluation.  ``terms`` say whether the client shares its weights.
    """

    def __init__(
        self,
        manifest: PartyManifest,
        data: Dataset,
        held_out: Dataset | None,
        *,
        terms: SharingTerms,
        epochs: int,
        batch_size: int,
    ) -> None:
        parts = [(TRAIN, data), *([] if held_out is None else [(PREDICT, held_out)])]
        self._manifest = manifest
        self._parts = [
            _describe_part(manifest, phase, dataset, epochs, batch_size) for phase, dataset in parts
        ]
        if terms.joins:
            self._parts.append(_describe_sharing(manifest, terms))

    def show(self, *, as_json: bool) -> None:
        """Print the description as sentences, or as one line of JSON."""
        if as_json:
            fields = {part["phase"]: part for part, _ in self._parts}
            states = self._manifest.raw_states
            kept = {"raw_states": states} if states else {}
            printing.print_json_lines([{"leaves": fields, **kept}])
            return
        from splitonnx.disclosures import describe_raw_states

        for sentence in describe_raw_states(self._manifest):
            print(escape(f"the client {sentence}"), flush=True)
        for _, sentence in self._parts:
            print(escape(sentence), flush=True)


def _describe_sharing(manifest: PartyManifest, terms: SharingTerms) -> tuple[dict[str, Any], str]:
    """Describe what a client shares in each round, as a dictionary and as a sentence."""
    from splitonnx.disclosures import list_sent

    sending = list_sent(manifest, SHARE)
    fields = {
        **summarize_sending(sending),
        "policy": terms.policy,
        "local_steps": terms.local_steps,
        "rounds": terms.rounds,
    }
    steps = "step" if terms.local_steps == 1 else f"{terms.local_steps:,} steps"
    return fields, (
        f"leaves the client after every {steps}: {_describe_shared(sending)}; the server's policy "
        f"'{terms.policy}' joins them with those of its other clients"
    )


def _describe_shared(sending: Sending) -> str:
    shared = [tensor for tensor in sending.tensors if tensor.wire.endswith(OWN)]
    size = sum(tensor.bytes or 0 for tensor in shared)
    return (
        f"the trained weights and statistics of this part ({len(shared):,} tensors, {size:,} bytes)"
    )


def _describe_part(
    manifest: PartyManifest, phase: str, data: Dataset, epochs: int, batch_size: int
) -> tuple[dict[str, Any], str]:
    """Describe what leaves the client in one phase of a run, as a dictionary and as a sentence."""
    from splitonnx.disclosures import count_run, describe_step, list_sent

    sending = list_sent(manifest, phase, batch=None if data.has_own_batches else batch_size)
    steps = total = None
    if data.size is not None and data.has_own_batches:
        steps = epochs * data.size
    elif data.size is not None:
        steps, total = count_run(
            manifest, phase, samples=data.size, batch=batch_size, passes=epochs
        )
    unit = "steps of a whole run" if phase == TRAIN else "batches to evaluate after each epoch"
    known = "" if total is None else f": {total:,} bytes"
    run = "" if steps is None else f"; in all {steps:,} {unit}{known}"
    fields = {**summarize_sending(sending), "steps": steps, "total_bytes": total}
    return fields, f"{describe_step(sending)}{run}"
