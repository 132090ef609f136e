"""Find running statistics and states that are unusual, which may affect training or predictions.

Running statistics with mean 0 and variance 1 in every channel still have their initial values.  If
the momentum of a BatchNormalization is 1, training never updates its running statistics.  An
exporter may store a running statistic and another tensor with the same numbers as one tensor.  A
state that the model hands itself from step to step is data unless the user says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.cutting.carried_states.suggestions import (
    describe_overlooked_states,
    find_likely_states,
)
from splitonnx.partitioner.cutting.passes.joined_statistics import describe_separations
from splitonnx.partitioner.cutting.preparations import PreparedModel
from splitonnx.partitioner.normalization.batchnorms import is_training, list_batchnorms
from splitonnx.partitioner.reports.remarks import Kind, Remark, list_names, make_option


def remark_on_statistics(prepared: PreparedModel) -> Iterator[Remark]:
    """Yield remarks on unusual running statistics of a model's BatchNormalizations.

    The remarks name statistics that an exporter stored together with another tensor, statistics
    that training will never update, and statistics that still have their initial values.
    """
    if told := describe_separations(prepared.separations):
        pairs = [name for one in prepared.separations for name in (one.source, one.name)]
        yield Remark(kind=Kind.JOINED_PARAMETERS, sentence=told, names=tuple(dict.fromkeys(pairs)))
    nodes = list_batchnorms(prepared.skeleton.graph)
    stored = [node for node in nodes if _list_statistics(prepared, node)]
    still = [node for node in stored if is_training(node) and _get_momentum(node) == 1]
    if still:
        yield Remark(
            kind=Kind.UNTRACKED_STATISTICS,
            sentence=f"{list_names(_name(still))} {_have(still)} momentum 1, so training never "
            "updates the running statistics, by which a prediction is normalised: if the model "
            "normalises by the batch in predictions, too (track_running_stats=False), these will "
            "differ; export it with statistics that are tracked",
            names=_name(still),
        )
    if stored and all(_are_initial(prepared, node) for node in stored):
        frozen = [node for node in stored if not is_training(node)]
        options = ("--batchnorm train",) if frozen else ()
        each = "the BatchNormalization" if len(stored) == 1 else "every BatchNormalization"
        yield Remark(
            kind=Kind.INITIAL_STATISTICS,
            sentence=f"the running statistics of {each} are the initial ones (mean 0, variance "
            "1): they were not tracked, or the model was not trained before its export"
            f"{'; frozen, they normalise nothing' if frozen else ''}",
            names=_name(stored),
            options=options,
        )


def remark_on_states(prepared: PreparedModel, output: str) -> Iterator[Remark]:
    """Yield a remark on outputs that the model probably reads as inputs in the next step.

    The loss is computed from ``output``.
    """
    found = find_likely_states(prepared, output)
    told = "".join(f"; now {one}" for one in describe_overlooked_states(prepared, output))
    if not found:
        return
    pairs = " and ".join(f"'{made}' that of '{source}'" for made, source in found)
    yield Remark(
        kind=Kind.STATE,
        sentence=f"outputs look like the next values of inputs: {pairs}; if the model hands itself "
        "this state from step to step, --state keeps it in training, and it is not part of the "
        "data; its shape must then be fixed with --dim, also the size of the batch"
        f"{told}",
        names=tuple(name for pair in found for name in pair),
        options=tuple(make_option("--state", f"{made}={source}") for made, source in found),
    )


def _list_statistics(prepared: PreparedModel, node: ir.Node) -> list[np.ndarray]:
    """Return a node's mean and variance, or an empty list if the model computes them."""
    names = [value.name or "" for value in node.inputs[3:5] if value is not None]
    stored = [prepared.weights[name].numpy() for name in names if name in prepared.weights]
    return stored if len(stored) == 2 else []


def _are_initial(prepared: PreparedModel, node: ir.Node) -> bool:
    mean, variance = _list_statistics(prepared, node)
    return bool((mean == 0).all() and (variance == 1).all())


def _get_momentum(node: ir.Node) -> float:
    return node.attributes.get_float("momentum", 0.9)


def _name(nodes: list[ir.Node]) -> tuple[str, ...]:
    return tuple(node.name or "" for node in nodes)


def _have(nodes: list[ir.Node]) -> str:
    return "has" if len(nodes) == 1 else "have"
