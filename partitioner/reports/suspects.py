"""Find tensors that are trained, or not trained, although the model's author may not want this.

Position tables, Fourier kernels and the mean of images are stored in the same way as weights.  They
can be recognised by their numbers (:mod:`formulas`), their names and the operators that use them.
Each remark names the tensors, the reason and, if there is one, the option that changes whether the
tensors are trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from splitonnx.partitioner.cutting.preparations import PreparedModel, describe_adapters
from splitonnx.partitioner.differentiation.control_flow.obstacles import find_obstacle
from splitonnx.partitioner.differentiation.untrained import explain_untrained
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.traversals import map_values, trace_gradients
from splitonnx.partitioner.lowerings.centred_normalizations import describe_narrow
from splitonnx.partitioner.normalization.constants.kept import describe_kept, describe_numbers
from splitonnx.partitioner.normalization.constants.structures import (
    find_power_vectors,
    is_time_step,
)
from splitonnx.partitioner.normalization.weights import INNER, list_returned, make_pattern
from splitonnx.partitioner.reports.formulas import (
    describe_formula,
    find_rotations,
    has_whole_numbers,
    is_fixed_filter,
)
from splitonnx.partitioner.reports.remarks import Kind, Remark, list_names, make_option

_KERNELS = frozenset({("Conv", 1), ("ConvTranspose", 1)})
_MATRICES = frozenset({("Gather", 0), ("Gemm", 0), ("Gemm", 1), ("MatMul", 0), ("MatMul", 1)})
_CONSTANT = re.compile(r"/(.*/)?Constant_(\d+_)?output_0")
"""Names that PyTorch's legacy exporter gives to numbers that are no parameters of the network."""
_FOLDED = re.compile(r"val_\d+")
"""Names that the dynamo exporter gives to numbers that it computed."""
_NORMS = frozenset(
    (kind, index) for kind in ("BatchNormalization", "InstanceNormalization") for index in (1, 2)
)
_WRITTEN = "equal and were written by the exporter as constants, which the network does not train"
_VECTORS = "singular vectors that a spectral norm keeps, which the network does not train"
_STEPS = "read one at a time as factors, like the step sizes of a solver"
_ROTATIONS = "cosines and sines of the same angles"
_WHOLE = "whole numbers, like a table of codes"
_FILTER = "small whole numbers but for a factor, like a fixed filter"


def find_computed(prepared: PreparedModel) -> dict[str, str]:
    """Find parameters that would be trained but look fixed, such as a filter for blurring.

    Return a mapping from each parameter's name to the reason why it looks fixed.  The reason
    completes the sentence "its numbers are ...".
    """
    inputs = {value.name: value for value in prepared.training.graph.inputs}
    given = {value.name: value for value in prepared.skeleton.graph.inputs}
    powers = find_power_vectors(prepared.skeleton.graph, prepared.weights)
    paired = find_rotations({name: prepared.weights[name] for name in prepared.trainable})
    reasons: dict[str, str] = {}
    for name in prepared.trainable:
        tensor = prepared.weights[name]
        places = _list_places(inputs.get(name))
        reason = _find_buffer(given.get(name), prepared.weights) or describe_formula(tensor)
        if reason is None and name in paired:
            reason = _ROTATIONS
        if name in powers:
            reason = _VECTORS
        if reason is None and name in given and is_time_step(given[name], tensor.numpy()):
            reason = _STEPS
        if reason is None and places & _KERNELS and is_fixed_filter(tensor):
            reason = _FILTER
        if reason is None and places & _MATRICES and has_whole_numbers(tensor):
            reason = _WHOLE
        if reason is not None:
            reasons[name] = reason
    return reasons


def _find_buffer(value: ir.Value | None, weights: Mapping[str, ir.TensorProtocol]) -> str | None:
    """Return the reason if a name and its numbers show that PyTorch trains no such parameter."""
    name = value.name or "" if value is not None else ""
    if name not in weights:
        return None
    tensor, places = weights[name], _list_places(value)
    if _CONSTANT.fullmatch(name) or (_FOLDED.fullmatch(name) and places and places <= _NORMS):
        array = tensor.numpy()
        return _WRITTEN if array.size > 0 and array.min() == array.max() else None
    return None


def _list_places(value: ir.Value | None) -> set[tuple[str, int]]:
    """Return the operators that read a weight, each with the index of the input."""
    uses = value.uses() if value is not None else ()
    return {(use.node.op_type, use.idx) for use in uses}


def remark_on_computed(reasons: Mapping[str, str]) -> Iterator[Remark]:
    """Yield remarks on parameters that look fixed, not learned: one remark for each reason.

    ``reasons`` maps each parameter's name to the reason why it looks fixed (see
    :func:`find_computed`).
    """
    for reason in dict.fromkeys(reasons.values()):
        names = tuple(name for name, own in reasons.items() if own == reason)
        one = len(names) == 1
        yield Remark(
            kind=Kind.FIXED_FILTER if reason == _FILTER else Kind.COMPUTED_TABLE,
            sentence=f"{list_names(names)} would be trained, but {'its' if one else 'their'} "
            f"numbers are {reason}: freeze {'it if it was' if one else 'them if they were'} not "
            "learned",
            names=names,
            options=(make_option("--freeze", make_pattern(names)),),
        )


def remark_on_kept(prepared: PreparedModel) -> Iterator[Remark]:
    """Yield remarks on what is not trained unless the user names it.

    These are the weights that only normalize a raw input (:attr:`PreparedModel.kept_scalings`),
    single numbers that may have been learned (:attr:`PreparedModel.kept_numbers`), and constants
    that may have been learned in spite of their role (:attr:`PreparedModel.kept_constants`).
    """
    names = prepared.kept_scalings
    if names:
        verb = "keeps its value" if len(names) == 1 else "keep their value"
        yield Remark(
            kind=Kind.INPUT_SCALING,
            sentence=f"{list_names(names)} {verb}: only a raw input is scaled or shifted by "
            f"{'it' if len(names) == 1 else 'them'}, before any other weight, as by an image's "
            "mean and deviation; --train trains what was learned after all",
            names=names,
            options=(make_option("--train", make_pattern(names)),),
        )
    if numbers := prepared.kept_numbers:
        yield Remark(
            kind=Kind.SINGLE_NUMBERS,
            sentence=describe_numbers(numbers),
            names=numbers,
            options=(make_option("--train", make_pattern(numbers)),),
        )
    for sentence, constants in describe_kept(prepared.kept_constants):
        yield Remark(
            kind=Kind.KEPT_CONSTANT,
            sentence=sentence,
            names=constants,
            options=(make_option("--train", make_pattern(constants)),),
        )


def remark_on_adapters(prepared: PreparedModel) -> Iterator[Remark]:
    """Yield a remark if only adapters are trained, because the model has some."""
    if told := describe_adapters(prepared):
        yield Remark(kind=Kind.ADAPTERS, sentence=told, names=prepared.adapters)


def remark_on_conditional(prepared: PreparedModel) -> Iterator[Remark]:
    """Yield a remark for each control-flow node with weights that cannot be trained."""
    held: dict[str, list[str]] = {}
    for value in list_returned(prepared.skeleton.graph):
        held.setdefault(value.metadata_props[INNER], []).append(value.name or "")
    nodes = {node.name or "": node for node in prepared.skeleton.graph}
    for node, names in held.items():
        reason = find_obstacle(nodes[node]) if node in nodes else None
        yield Remark(
            kind=Kind.CONDITIONAL_WEIGHTS,
            sentence=f"{list_names(names)} in node '{node}' will not be trained: "
            f"{reason or 'its branches or iterations depend on the data'}; export the model "
            f"without this control flow to train {'it' if len(names) == 1 else 'them'}",
            names=tuple(names),
        )


def remark_on_precisions(prepared: PreparedModel) -> Iterator[Remark]:
    """Yield a remark for each type of parameters that are trained in another type.

    Another remark tells of normalizations that lose precision in the model given.
    """
    types = {value.name: value.dtype for value in prepared.skeleton.graph.inputs}
    held: dict[str, list[str]] = {}
    for name in prepared.trainable:
        own, trained = types.get(name), prepared.weights[name].dtype
        if own is not None and own is not trained:
            held.setdefault(own.name.lower(), []).append(name)
    for kind, names in held.items():
        verb, pronoun = ("is", "it is") if len(names) == 1 else ("are", "they are")
        yield Remark(
            kind=Kind.PRECISION,
            sentence=f"{list_names(names)} {verb} of type {kind}: {pronoun} trained in float32, "
            f"and rounded to {kind} once merged",
            names=tuple(names),
        )
    if told := describe_narrow(prepared.skeleton.graph):
        yield Remark(kind=Kind.PRECISION, sentence=told)


@attribute_errors_to_pass("searched for what gets no gradient")
def remark_on_untrained(
    prepared: PreparedModel, outputs: Sequence[str], names: Sequence[str]
) -> Iterator[Remark]:
    """Yield a remark for each reason why weights stay as they are in training.

    The reasons are those of the first output, if there are several.
    """
    if not names:
        return
    trained = map_values(prepared.training.graph)
    traced = trace_gradients(trained[output] for output in outputs)
    graph = prepared.skeleton.graph
    reached = {value.name or "" for value in traced}
    reasons = explain_untrained(graph, map_values(graph)[outputs[0]], names, reached)
    for reason in dict.fromkeys(reasons.values()):
        found = tuple(name for name in names if reasons.get(name) == reason)
        yield Remark(
            kind=Kind.WITHOUT_GRADIENT,
            sentence=f"{list_names(found)} {'stays' if len(found) == 1 else 'stay'} as given, "
            f"though not frozen: {reason} {'it' if len(found) == 1 else 'them'}",
            names=found,
        )
