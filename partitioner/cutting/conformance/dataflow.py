"""Run whole models, and the parts of a bundle as the two parties would.

The models run in the worker process for native code, so a crash does not end this process.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.disclosures import list_labels
from splitonnx.errors import NativeCrash, UnsupportedModel, flatten
from splitonnx.kernel_errors import UNLOADABLE, describe_kernel_error
from splitonnx.manifests import Source, Stage
from splitonnx.names import PREDICT
from splitonnx.partitioner.cutting.conformance.samples import Arrays
from splitonnx.partitioner.gate.walks import label_node, list_nodes
from splitonnx.partitioner.graphs.transcripts import write_model
from splitonnx.partitioner.native import natives, workers
from splitonnx.partitioner.native.loadings import find_unloadable, is_unloadable
from splitonnx.partitioner.native.stored_tensors import (
    Separated,
    Stored,
    separate_weights,
    store_arrays,
)
from splitonnx.partitioner.normalization.weights import read_array

Level: TypeAlias = Literal["none", "basic", "all", "usual"]
"""A level of ONNX Runtime's graph optimizations.

Sessions of level ``usual`` are those that users make: without splitonnx's own settings.
"""
Runnable: TypeAlias = bytes | onnx.ModelProto | Separated
"""A model, serialized or as a message, or with its large weights apart.

Unless it is serialized, large weights are sent to the worker process only if equal ones were not
sent before, inside a block of :func:`native.requests.keeping_contents`.
"""
Run: TypeAlias = Callable[[Sequence[Arrays]], list[Arrays]]
"""A function that runs a model on batches of inputs, and returns the outputs of each batch."""
_FAILED = re.compile(r"(?:a node|node '[^']*') \(\w+\) fails")
_POOLINGS = frozenset({"AveragePool", "MaxPool"})
SECONDS = 1.0
"""The processor time allowed to the reference evaluator, whose Python loops can be very slow."""


class NotRun(Exception):
    """Raised if a model cannot be run on the given inputs; the message contains the reason."""


def describe_failure(error: NotRun) -> str:
    """Return the node that failed, as ONNX Runtime names it, or else the entire message."""
    found = _FAILED.search(str(error))
    return str(error) if found is None else found[0]


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model made from the original one, such as the merged model, or the parts of the cut model.

    ``label`` names this model in messages.  ``run`` runs it and returns its outputs.  ``trace``
    runs the prepared model from which it was made, and returns all tensors.  ``plain`` runs the
    same as ``run`` without ONNX Runtime's optimizations, or is ``None`` if ``run`` has none itself.
    ``has_all`` is true if this model should have every output of the original.  If ``advice`` is
    not empty, a difference is not reported as a mistake of splitonnx, but in a remark with it.
    """

    label: str
    run: Run
    trace: Run
    plain: Run | None = None
    has_all: bool = True
    advice: str = ""


class BrokeDown(NotRun):
    """Raised if native code ends its process while it runs a model."""


class NotLoaded(NotRun):
    """Raised if ONNX Runtime cannot load a model; the message names the node and the reason."""


class CorrectionFailed(NotRun):
    """Raised if an operator of :mod:`native.corrections` fails on a model or on its inputs."""


class EvaluatorFailed(NotRun):
    """Raised if onnx's reference evaluator makes a mistake of its own, which tells no one else."""


def run_reference(model: Runnable, batches: Sequence[Arrays], subject: str) -> list[Arrays]:
    """Run a model with onnx's reference evaluator, and return each batch's outputs.

    ``subject`` names the model in error messages.

    Raises:
        NotRun: the evaluator refuses the model or the inputs, or is too slow.
        EvaluatorFailed: the evaluator cannot run such a model.
        CorrectionFailed: an operator of :mod:`native.corrections` fails.
    """
    given, light = _encode(batches), _separate(model)
    try:
        return _decode(
            lambda: workers.call(
                natives.run_reference, subject, light.content, given, SECONDS, light.weights
            )
        )
    except NotRun as error:
        if getattr(error.__cause__, "kind", "") != RuntimeError.__name__:
            raise
        raise EvaluatorFailed(
            f"onnx's reference evaluator cannot run it, by a mistake of its own ({error})"
        ) from error


def run_session(
    model: Runnable, batches: Sequence[Arrays], subject: str, *, level: Level
) -> list[Arrays]:
    """Run a model with ONNX Runtime, and return the outputs of each batch by name.

    ``subject`` names the model in error messages.

    Raises:
        NotRun: ONNX Runtime refuses the model or the inputs.
        NotLoaded: it refuses a node whatever the inputs are.
    """
    given, light = _encode(batches), _separate(model)
    try:
        return _decode(
            lambda: workers.call(
                natives.run_session, subject, light.content, given, level, light.weights
            )
        )
    except NotRun as error:
        node = find_unloadable(light.join(), subject) if is_unloadable(error) else None
        if node is None:
            raise
        raise NotLoaded(
            str(error).replace(UNLOADABLE, f"{label_node(node)} cannot be loaded", 1)
        ) from error


def _separate(model: Runnable) -> Separated:
    if isinstance(model, bytes):
        return Separated(content=model)
    return model if isinstance(model, Separated) else separate_weights(model)


def _encode(batches: Sequence[Arrays]) -> list[dict[str, bytes | Stored]]:
    """Encode the arrays of batches to send them to another process, large ones only once."""
    stored = store_arrays(array for batch in batches for array in batch.values())
    encoded: list[dict[str, bytes | Stored]] = []
    for batch in batches:
        large = {name: stored[id(array)] for name, array in batch.items() if id(array) in stored}
        small = {name: array for name, array in batch.items() if name not in large}
        encoded.append({**natives.encode_arrays(small), **large})
    return encoded


def run_original(
    model: Runnable, batches: Sequence[Arrays], subject: str, *, is_pooled: bool
) -> list[Arrays]:
    """Run a model without optimizations, and return each batch's outputs.

    If ``is_pooled`` is true (:func:`has_poolings`), it also runs with optimizations, so that inputs
    over which those end the process are refused: nobody can use the model for them.

    Raises:
        NotRun: ONNX Runtime refuses the model or the inputs.
        BrokeDown: ONNX Runtime ends its process.
    """
    made = run_session(model, batches, subject, level="none")
    if is_pooled:
        try:
            run_session(model, batches, subject, level="all")
        except BrokeDown:
            raise
        except NotRun:
            pass  # it runs as it is written
    return made


def has_poolings(model: onnx.ModelProto) -> bool:
    """Return whether a model has poolings: optimized ones may break down over small images."""
    return any(node.op_type in _POOLINGS for node in list_nodes(model.graph.node))


def run_prepared(
    model: ir.Model,
    weights: Mapping[str, ir.TensorProtocol],
    batches: Sequence[Arrays],
    subject: str,
    *,
    is_traced: bool = False,
) -> list[Arrays]:
    """Run one form of a prepared model, and return the outputs of each batch by name.

    A graph input in ``weights`` has this value, unless the batches hold others.

    If ``is_traced`` is true, return all tensors of the model's graph instead.

    Raises:
        NotRun: ONNX Runtime refuses the model or the inputs.
    """
    written = expose(write_model(model)) if is_traced else write_model(model)
    given = set().union(*batches)
    arrays = {name: read_array(tensor) for name, tensor in weights.items() if name not in given}
    return run_session(inline_weights(written, arrays), batches, subject, level="none")


def run_split(
    bundle: Bundle, batches: Sequence[Arrays], subject: str, *, level: Level = "all"
) -> list[Arrays]:
    """Predict with the parts of a bundle, one stage after another.

    Return a dictionary for each batch with its inputs and with the outputs of all stages.  A tensor
    has the same name at the party that sends it and at the party that receives it.  A state has its
    initial value, unless a batch holds another.

    Raises:
        NotRun: ONNX Runtime refuses a stage or its inputs.
    """
    values = [dict(batch) for batch in batches]
    for party, stage in _order_stages(bundle):
        states = {i.name: party.weights[i.name] for i in stage.inputs if i.source is Source.STATE}
        read = [i.name for i in stage.inputs if i.source is not Source.STATE]
        carried = {name for _, name in bundle.manifest.recipe.states}.intersection(states)
        given = [
            {name: value[name] for name in read}
            | {n: value.get(n, array) if n in carried else array for n, array in states.items()}
            for value in values
        ]
        made = run_session(party.graphs[stage.graph], given, subject, level=level)
        for value, outputs in zip(values, made, strict=True):
            value.update(outputs)
    return values


def run_merged(
    bundle: Bundle, merged: Runnable, batches: Sequence[Arrays], subject: str, *, level: Level
) -> list[Arrays]:
    """Run the merged model, which may lack the labels of the model's own loss."""
    labels = list_labels(bundle.client.manifest)
    given = [{n: a for n, a in batch.items() if n not in labels} for batch in batches]
    return run_session(merged, given, subject, level=level)


def _order_stages(bundle: Bundle) -> list[tuple[PartyBundle, Stage]]:
    """List the stages of prediction, each after the stages whose outputs it reads."""
    waiting = [
        (party, stage)
        for party in bundle.parties.values()
        for phase in party.manifest.phases
        if phase.name == PREDICT
        for stage in phase.stages
    ]
    made = {name for _, stage in waiting for name in stage.outputs}
    ordered = []
    while waiting:
        ready = [entry for entry in waiting if not _list_read(entry[1]) & made]
        assert ready, "stages wait for each other"
        ordered += ready
        waiting = [entry for entry in waiting if entry not in ready]
        made -= {name for _, stage in ready for name in stage.outputs}
    return ordered


def _list_read(stage: Stage) -> set[str]:
    return {i.name for i in stage.inputs if i.source in (Source.WIRE, Source.STASH)}


def _decode(run: Callable[[], Sequence[Mapping[str, bytes]]]) -> list[Arrays]:
    try:
        return [natives.decode_arrays(outputs) for outputs in run()]
    except (workers.Refused, NativeCrash) as error:
        is_corrected = getattr(error, "kind", "") == natives.CorrectionFailed.__name__
        is_breakdown = isinstance(error, NativeCrash) and error.is_breakdown
        kind = CorrectionFailed if is_corrected else BrokeDown if is_breakdown else NotRun
        raise kind(flatten(describe_kernel_error(str(error)))) from error


def refuse_breakdowns(run: Run, label: str, subject: str) -> Run:
    """Return a function like ``run`` that refuses a model which no party could run.

    ``label`` names what ``run`` runs, and ``subject`` names the model from which it was made.

    Raises:
        NativeCrash: raised by the function returned if native code ends its process, since a party
            would be ended in the same way.
        UnsupportedModel: raised by the function returned if a node cannot be loaded.
    """

    def run_all(batches: Sequence[Arrays]) -> list[Arrays]:
        try:
            return run(batches)
        except NotLoaded as error:
            reason = str(error).rstrip(".")
            raise UnsupportedModel(
                subject,
                f"ONNX Runtime, with which the parties train, cannot run it ({reason})",
                "export the model with other attributes of this node, or with another operator",
            ) from error
        except BrokeDown as error:
            crash = error.__cause__
            reason = crash.reason if isinstance(crash, NativeCrash) else str(error)
            raise NativeCrash(
                f"{label}, made from {subject}",
                f"{reason}, which would also end a party that trains or predicts",
                "cut at another tensor, or export the model otherwise, and please report it with "
                "the model; --no-check (check=False) leaves out this comparison",
                is_breakdown=True,
            ) from error

    return run_all


def inline_weights(model: onnx.ModelProto, weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """Replace the inputs that are weights by initializers.

    ``weights`` maps the names of these inputs to their values.  The model is changed in place and
    returned.
    """
    kept = [value for value in model.graph.input if value.name not in weights]
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for name, array in weights.items():
        if name in types:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(types[name])
            model.graph.initializer.append(
                onnx.numpy_helper.from_array(array.astype(dtype, copy=False), name)
            )
    return model


def expose(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make each tensor that a model's graph computes an output of the model.

    The model is changed in place and returned.
    """
    known = {value.name for value in model.graph.output}
    made = [name for node in model.graph.node for name in node.output if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in known)
    return model
