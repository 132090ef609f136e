"""Compare what a model computes for a batch with what it computes for each sample alone.

A model that was exported with a batch of 1 may contain nodes that mix samples if there are several,
such as a mean over the first two axes.  So if a fixed batch is freed, by the user or in
preparation, the model in its file is run on single samples, and its results are stacked.  Only the
form for inference is compared, because BatchNormalization in training mode always mixes samples.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx

from splitonnx.errors import BatchNotFreed, DifferentResult, MixedSamples
from splitonnx.partitioner.cutting.conformance.alignments import (
    measure_merged,
    measure_somehow_stacked,
    measure_stacked,
    stack,
)
from splitonnx.partitioner.cutting.conformance.dataflow import (
    Made,
    NotRun,
    describe_failure,
    expose,
    run_reference,
    run_session,
)
from splitonnx.partitioner.cutting.conformance.expectations import Expectation, expect
from splitonnx.partitioner.cutting.conformance.freed_batches import FreedBatch
from splitonnx.partitioner.cutting.conformance.measures import (
    TOLERATED,
    Difference,
    find_largest,
)
from splitonnx.partitioner.cutting.conformance.originals import copy_original
from splitonnx.partitioner.cutting.conformance.samples import Arrays, iter_draws
from splitonnx.partitioner.gate.walks import list_bodies, list_nodes

_SCALES = (1.0, 2.0, 0.5)
"""The standard deviations of the pieces that are drawn; a batch of more pieces repeats them.

They differ, so that a result for all pieces is far from the mean of the results for each.
"""
_SEEDS = (0, 1)
"""As in :mod:`comparisons`: a difference counts only if both seeds show it."""
_SEED_STEP = 100
"""The distance between the seeds of two pieces."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model whose samples are compared.

    ``original`` is the model in its form for inference, with the sizes that the user asked for.
    ``freed`` names the nodes that preparation changed because of a batch of 1.  If ``has_loss`` is
    true, the model computes its own loss, which is a mean or a sum over the samples.
    """

    name: str
    original: onnx.ModelProto
    freed: Collection[str] = ()
    has_loss: bool = False


def describe_unchecked(batches: Sequence[FreedBatch], reason: str = "") -> list[str]:
    """Return a warning for each size in ``batches`` that the user changed: it was not compared.

    ``reason`` explains why no comparison was made; it may be empty.
    """
    return [_describe_unchecked(batch, reason) for batch in batches if batch.options]


def _describe_unchecked(batch: FreedBatch, reason: str) -> str:
    why = f" ({reason})" if reason else ""
    if not batch.is_batch:
        return (
            f"{batch.options}: nodes that the exporter wrote for the fixed size may compute "
            f"something else with another, which cannot be checked{why}; compare predictions with "
            "those of a model exported for the other size"
        )
    return (
        f"{batch.options}: nodes that the exporter wrote for the fixed size may mix samples, which "
        f"was not checked{why}; compare the predictions for several samples with those for each "
        "alone, or export again"
    )


def compare_samples(batch: FreedBatch, subject: Subject, made: Sequence[Made]) -> list[str]:
    """Compare results for several samples with the original's results for each sample alone.

    ``made`` lists the models that were made from the original.  Return remarks about small
    differences and about what could not be compared.  If the user did not ask for the batch to be
    freed, a model that mixes samples also leads only to a remark, because its author may have
    intended that.

    Raises:
        MixedSamples: samples influence each other in a model whose batch the user freed.
        BatchNotFreed: a model whose batch the user freed does not run on several samples.
        DifferentResult: a mistake of splitonnx makes samples influence each other.
    """
    if not batch.counts:
        return describe_unchecked([batch])
    draw = partial(_draw_pieces, batch)
    piece = batch.fix(subject.original)
    try:
        expectation = expect(piece, subject.name, _SEEDS[0], draw)
        if batch.rows > 1 and _mixes_itself(batch, subject, expectation):
            return [
                f"{batch.options}: {subject.name} mixes the {batch.rows} samples of a batch "
                "itself, so its results for other batches could not be compared"
            ]
    except NotRun as error:
        return describe_unchecked([batch], str(error))
    remarks: list[str] = []
    for each in made:
        try:
            difference = _find_mixed(batch, subject, expectation, each)
            if not difference.size:
                continue
            again = expect(piece, subject.name, _SEEDS[1], draw)
            size = min(difference.size, _find_mixed(batch, subject, again, each).size)
        except NotRun as error:
            if _fails_on_pieces(batch, expectation, each):
                return [*remarks, *describe_unchecked([batch], str(error))]
            if batch.options and each is made[0]:
                tried = batch.counts[0] * batch.rows
                raise BatchNotFreed(
                    subject.name, batch.options, batch.rows, tried, str(error)
                ) from error
            remarks.append(
                f"{each.label} still takes a batch of {batch.rows} only ({describe_failure(error)} "
                f"with more); {_advise_single(batch)}"
            )
            if each is made[0]:
                return remarks
            continue
        if size > TOLERATED:
            return [*remarks, _refuse(batch, subject, expectation, each, difference, made[0])]
        if size:
            remarks.append(
                f"{each.label} differs by {size:.1e} between a batch and single samples, in "
                f"'{difference.tensor}'"
            )
    difference = _find_mixed_statistics(batch, subject, expectation, made[:1])
    if difference.size > TOLERATED:
        remarks.append(_refuse(batch, subject, expectation, made[0], difference, made[0]))
    return remarks


def _fails_on_pieces(batch: FreedBatch, expectation: Expectation, made: Made) -> bool:
    """Return whether what fails on several pieces fails on each alone, for another reason.

    Only onnx's reference evaluator took these then, which reads a negative length, for example.
    """
    if expectation.session is not None or len(batch.counts) < 2:  # a size of its own has no pieces
        return False
    try:
        made.run(expectation.batches)
    except NotRun:
        return True
    return False


def _draw_pieces(
    batch: FreedBatch, model: onnx.ModelProto, seed: int, scale: float
) -> Iterator[list[Arrays]]:
    """Yield random pieces that differ only in the inputs whose batch is freed."""
    draws = [
        iter_draws(model, seed + number * _SEED_STEP, scale * own)
        for number, own in enumerate(_SCALES)
    ]
    for drawn in zip(*draws, strict=True):
        pieces = [batches[0] for batches in drawn]
        yield [{**pieces[0], **{name: piece[name] for name in batch.axes}} for piece in pieces]


def _stack(batch: FreedBatch, pieces: Sequence[Arrays]) -> list[Arrays]:
    return [stack(_repeat(pieces, count), batch.axes) for count in batch.counts]


def _repeat(pieces: Sequence[Arrays], count: int) -> list[Arrays]:
    return [pieces[number % len(pieces)] for number in range(count)]


def _find_mixed(
    batch: FreedBatch, subject: Subject, expectation: Expectation, made: Made
) -> Difference:
    """Return the largest difference between a batch and its pieces that rounding cannot explain."""
    found = made.run(_stack(batch, expectation.batches))
    outcomes = [each for each in (expectation.reference, expectation.session) if each is not None]
    dependent = _find_dependent(batch, expectation.model.graph)
    differences = []
    for outcome in outcomes:
        measured = [
            Difference(
                tensor=name,
                batch=number,
                size=measure_stacked(
                    have[name],
                    [piece[name] for piece in _repeat(outcome, batch.counts[number])],
                    batch.rows,
                    is_mean=subject.has_loss,
                ),
            )
            for number, have in enumerate(found)
            for name in outcome[0]
            if name in have and name in dependent
        ]
        differences.append(
            find_largest([each for each in measured if each.size > _allow(expectation, each)])
        )
    return min(differences, key=lambda difference: difference.size)


def _allow(expectation: Expectation, difference: Difference) -> float:
    """Return what rounding can explain in a tensor of any piece, since a batch holds them all."""
    pieces = range(len(expectation.batches))
    return max(expectation.allow(difference.tensor, piece) for piece in pieces)


def _find_dependent(batch: FreedBatch, graph: onnx.GraphProto) -> set[str]:
    """Find the tensors that depend on the numbers, not only the sizes, of the batch's inputs."""
    found = set(batch.axes)
    for node in graph.node:
        if node.op_type in ("Shape", "Size"):
            continue
        if not found.isdisjoint([*node.input, *_list_outer(node)]):
            found.update(name for name in node.output if name)
    return found


def _list_outer(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names of all tensors that the bodies of a node read."""
    for body in list_bodies(node):
        yield from (value.name for value in body.output)
        for inner in list_nodes(body.node):
            yield from inner.input


def _mixes_itself(batch: FreedBatch, subject: Subject, expectation: Expectation) -> bool:
    """Return whether samples of one piece influence each other in the original.

    The first sample of one piece is put before the other samples of another piece.  If samples do
    not influence each other, each resulting number is also a result of one of the two pieces.
    """
    first, second = expectation.batches[:2]
    mixed = dict(first)
    for name, axis in batch.axes.items():
        row, rest = np.split(first[name], [1], axis)[0], np.split(second[name], [1], axis)[1]
        mixed[name] = np.concatenate([row, rest], axis)
    try:
        (found,) = run_session(expectation.model, [mixed], subject.name, level="none")
        outcome = expectation.session or expectation.reference or ()
    except NotRun:
        (found,) = run_reference(expectation.model, [mixed], subject.name)
        outcome = expectation.reference or expectation.session or ()
    return any(
        not _is_from_either(array, outcome[0][name], outcome[1][name])
        for name, array in found.items()
        if not (subject.has_loss and array.size == 1)
    )


def _is_from_either(found: np.ndarray, first: np.ndarray, second: np.ndarray) -> bool:
    if found.shape != first.shape or found.shape != second.shape:
        return False
    if found.dtype.kind in "OSU":
        return bool(((found == first) | (found == second)).all())
    scale = TOLERATED * max(float(np.abs(first).max(initial=0)), 1e-30)
    near = [np.isclose(found, each, rtol=0, atol=scale, equal_nan=True) for each in (first, second)]
    return bool((near[0] | near[1]).all())


def _refuse(
    batch: FreedBatch,
    subject: Subject,
    expectation: Expectation,
    made: Made,
    difference: Difference,
    prepared: Made,
) -> str:
    """Raise an error about mixed samples, or return a remark if the user did not free the batch."""
    node, tensor = _find_first(batch, subject, expectation, made, difference)
    if node.name in subject.freed or made is not prepared:
        raise DifferentResult(subject.name, made.label, difference.tensor, tensor, difference.size)
    name = node.name or node.output[0]
    if batch.options:
        raise MixedSamples(
            subject.name,
            batch.options,
            batch.rows,
            name,
            node.op_type,
            tensor,
            difference.tensor,
        )
    return (
        f"node '{name}' ({node.op_type}) of {subject.name} mixes samples, and a batch of 1 in the "
        "model's file leaves open whether this is meant for larger batches; "
        f"{_advise_single(batch)}"
    )


def _advise_single(batch: FreedBatch) -> str:
    options = " ".join(f"--dim {place}:{axis}={batch.rows}" for place, axis in batch.places)
    batches = f"batches of {batch.rows}"
    return f"export it again with a dynamic batch, or keep {batches} with {options}"


def _find_mixed_statistics(
    batch: FreedBatch, subject: Subject, expectation: Expectation, made: Sequence[Made]
) -> Difference:
    """Return the largest difference between a batch and its pieces in what is normalized.

    In training, a BatchNormalization computes statistics over all axes except the second one.  This
    is as intended if samples are on the first axis.  If samples are merged into the second axis,
    each sample has its own statistics.  The results of inference may not show such mistakes.
    """
    graph = expectation.model.graph
    dependent = _find_dependent(batch, graph)
    normalized = [
        node.input[0]
        for node in graph.node
        if node.op_type == "BatchNormalization" and node.input[0] in dependent
    ]
    traces = [_trace(batch, subject, expectation, each) for each in made if normalized]
    return find_largest(
        [
            Difference(tensor=name, batch=0, size=measure_merged(*values, axes=(0, 1)))
            for trace in traces
            for name in normalized
            if (values := _read_traced(batch, trace, name)) is not None
        ]
    )


def _find_first(
    batch: FreedBatch,
    subject: Subject,
    expectation: Expectation,
    made: Made,
    difference: Difference,
) -> tuple[onnx.NodeProto, str]:
    """Return the first node before a differing tensor whose result for a batch differs, too.

    Return the name of its result as well.  If no tensor within the model can be compared, return
    the node that computes the differing tensor.
    """
    nodes = _list_before(expectation.model.graph, difference.tensor)
    dependent = _find_dependent(batch, expectation.model.graph)
    trace = _trace(batch, subject, expectation, made)
    for node in nodes:
        for name in map(str, node.output):
            values = _read_traced(batch, trace, name) if name in dependent else None
            if values is None:
                continue
            size = measure_somehow_stacked(*values, batch.rows, is_mean=subject.has_loss)
            if size > TOLERATED:
                return node, name
    return nodes[-1], difference.tensor


def _trace(
    batch: FreedBatch, subject: Subject, expectation: Expectation, made: Made
) -> tuple[Sequence[Arrays], Arrays]:
    """Return all tensors of the original for each piece, and of the prepared model for a batch."""
    traced = expose(copy_original(expectation.model))
    try:
        expected = run_session(traced, expectation.batches, subject.name, level="none")
        (found,) = made.trace(_stack(batch, expectation.batches)[:1])
    except NotRun:
        return [{} for _ in expectation.batches], {}
    return expected, found


def _read_traced(
    batch: FreedBatch, trace: tuple[Sequence[Arrays], Arrays], name: str
) -> tuple[np.ndarray, list[np.ndarray]] | None:
    """Return a tensor for a batch and for each of its pieces, or ``None`` if one is not known."""
    expected, found = trace
    if name not in found or any(name not in piece for piece in expected):
        return None
    return found[name], [piece[name] for piece in _repeat(expected, batch.counts[0])]


def _list_before(graph: onnx.GraphProto, tensor: str) -> list[onnx.NodeProto]:
    """List the nodes that a tensor depends on, in the graph's order."""
    wanted, found = {tensor}, []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update({*node.input, *_list_outer(node)} - {""})
            found.append(node)
    return found[::-1]
