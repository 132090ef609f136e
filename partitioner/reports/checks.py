"""Check whether a model can be trained, which operators are rewritten, and where it can be cut.

The check runs the same steps as a cut and collects their results.  It does not write any files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import onnx_ir as ir

from splitonnx.errors import (
    BatchNotFreed,
    MixedSamples,
    ModelError,
    NotDifferentiable,
    TooManyTries,
    UsageError,
)
from splitonnx.losses import FROM_MODEL, LossSource
from splitonnx.manifests import Role
from splitonnx.names import DropoutMode
from splitonnx.optimizers import ParameterGroup, assign_groups
from splitonnx.partitioner.cutting.carried_states.declarations import Pairs, list_pairs
from splitonnx.partitioner.cutting.conformance.freeing_trials import Trials
from splitonnx.partitioner.cutting.joints import build_training
from splitonnx.partitioner.cutting.passes.stored_options import describe_stored
from splitonnx.partitioner.cutting.preparations import (
    PreparedModel,
    find_roles,
    list_trained,
    prepare,
)
from splitonnx.partitioner.differentiation.control_flow.obstacles import list_undifferentiable
from splitonnx.partitioner.gate.adjustments import Adjustments, Binding
from splitonnx.partitioner.gate.gates import ModelSource, open_model
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.pauses import pause_collection
from splitonnx.partitioner.graphs.traversals import find_moving
from splitonnx.partitioner.legal_cuts import ReadOutputs
from splitonnx.partitioner.lowerings import lower
from splitonnx.partitioner.normalization.weights import list_returned
from splitonnx.partitioner.reports.batches import note_batch, remark_on_batches
from splitonnx.partitioner.reports.detaches import remark_on_detaches
from splitonnx.partitioner.reports.diagnoses import diagnose
from splitonnx.partitioner.reports.inspections import CutCandidate, list_cuts
from splitonnx.partitioner.reports.layers import Layer, list_layers
from splitonnx.partitioner.reports.loss_readings import (
    TriedLosses,
    remark_on_losses,
    try_losses,
)
from splitonnx.partitioner.reports.memory.estimates import PartyMemory, estimate_memory
from splitonnx.partitioner.reports.remarks import Kind, Remark, make_option
from splitonnx.partitioner.reports.running_statistics import (
    remark_on_states,
    remark_on_statistics,
)
from splitonnx.partitioner.reports.suspects import (
    find_computed,
    remark_on_adapters,
    remark_on_computed,
    remark_on_conditional,
    remark_on_kept,
    remark_on_precisions,
    remark_on_untrained,
)
from splitonnx.partitioner.reports.ties import remark_on_ties


class Handling(StrEnum):
    """How an operator is handled in training.

    - ``native``: the operator is differentiated directly.
    - ``rewritten``: it is replaced by other operators first.
    - ``forward only``: it needs no gradient, because it comes before all trained parameters or
      computes integers.
    - ``in the way``: it would need a gradient, but no gradient is defined for it.  This prevents
      training.
    """

    NATIVE = "native"
    REWRITTEN = "rewritten"
    FORWARD = "forward only"
    OBSTACLE = "in the way"


@dataclass(frozen=True, kw_only=True)
class OperatorUse:
    """An operator, how it is handled, and the number of its nodes that are handled in this way."""

    operator: str
    handling: Handling
    nodes: int


@dataclass(frozen=True, kw_only=True)
class AppliedGroup:
    """A parameter group, and the names of the trained parameters to which it applies."""

    group: ParameterGroup
    parameters: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of :func:`check`.

    ``outputs`` are those that the losses are computed from, and ``output`` is the first of them;
    ``losses`` names the losses that fit.  ``obstacles`` holds one sentence for each
    reason why the model cannot be trained; if it is empty, the model can be trained.  ``layers``
    lists the weights by layer, and ``groups`` the parameter groups that were given.  ``remarks``
    describe what the export changed, and where training may differ from what the model's author
    intended; they may include options of ``cut``.  If finding all cuts would take too long,
    ``cuts`` is empty, and a remark gives the reason.  ``memory`` has an entry for each party of the
    cut that was named, if one was.

    These fields count the elements of weights and states:

    - ``parameters``: trained parameters, that is, those that get a gradient from ``outputs``;
    - ``frozen``: weights that are not trained;
    - ``untrained``: the weights in ``frozen`` that are frozen only because training from
      ``outputs`` cannot change them: parameters that get no gradient, and running statistics on
      which none of these depends; a remark names them, with the reason;
    - ``statistics``: running statistics that training updates;
    - ``carried``: states that the model hands itself from step to step;
    - ``conditional``: weights that cannot be trained because they are in branches or loops that
      depend on data.
    """

    opset: int
    producer: str
    output: str
    outputs: tuple[str, ...]
    losses: tuple[str, ...]
    obstacles: tuple[str, ...]
    remarks: tuple[Remark, ...]
    operators: tuple[OperatorUse, ...]
    parameters: int
    frozen: int
    untrained: int
    statistics: int
    carried: int
    conditional: int
    layers: tuple[Layer, ...]
    groups: tuple[AppliedGroup, ...]
    cuts: tuple[CutCandidate, ...]
    memory: tuple[PartyMemory, ...] = ()

    @property
    def trainable(self) -> bool:
        """Return whether the model can be trained without changes, on both target runtimes."""
        return not self.obstacles


@pause_collection()
def check(
    model: ModelSource,
    *,
    loss: LossSource | None = None,
    output: str | None = None,
    dims: Mapping[str, int | str] | None = None,
    bind: Mapping[str, Binding] | None = None,
    states: Pairs = (),
    dequantize: bool = False,
    dropout: DropoutMode | None = None,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
    groups: Sequence[ParameterGroup] = (),
    at: Sequence[str] = (),
    tail_at: Sequence[str] = (),
    batch: int = 1,
) -> Check:
    """Check whether and how a model can be trained.

    Args:
        model: a path, the bytes of an ONNX model, or a loaded model.
        loss: the loss to try, or several, as for ``cut``; by default the first one that fits.
        output: the output from which the loss is computed, unless the loss names its own; by
            default the first float output.
        dims, bind, states: sizes, values and states of inputs, as for ``cut``.
        dequantize: whether to replace integer arithmetic, as for ``cut``.
        dropout, train, freeze: whether Dropout nodes are on, and what is trained, as for ``cut``.
        groups: the optimizer's parameter groups.
        at, tail_at: a cut, as for ``cut``, whose memory is estimated for batches of ``batch``.

    Raises:
        NotAModel, ForbiddenExternalData: the model cannot be read.
        UnsupportedModel: the model cannot be prepared; the message names the node.
        UsageError: ``loss`` is not a loss, the model has no such ``output``, or a group has no
            parameter.
        CutError: the tensors in ``at`` and ``tail_at`` do not exist or do not divide the model.
    """
    adjustments = Adjustments(dims=dims or {}, bindings=bind or {}, dequantize=dequantize)
    opened = open_model(model, adjustments)
    producer = " ".join(filter(None, (opened.producer_name, opened.producer_version)))
    decided = {Kind.DROPOUT_OFF: dropout, Kind.STORED_INTEGERS: dequantize}
    exported = [one for one in diagnose(opened) if not decided.get(one.kind)]
    prepared = prepare(
        opened,
        dropout=dropout,
        train=train,
        freeze=freeze,
        adjustments=adjustments,
        states=list_pairs(states),
    )
    tried = try_losses(prepared, loss, output)
    faults, obstacles = _try_training(prepared, tried)
    trials = Trials(source=model, has_loss=any(one.kind == FROM_MODEL for one in tried.trained))
    doubts, noticed = _list_remarks(prepared, tried, producer, trials)
    mixed, unmixed = _compare_samples(trials, prepared)
    cuts, unlisted = _list_cuts(prepared, tried)
    roles = find_roles(prepared, tried.outputs)
    carried = sum(prepared.weights[name].size for name in prepared.carried)
    obstacles = (*map(str, faults), *obstacles, *mixed)
    wants_memory = at and not obstacles
    untrained = [name for name, role in roles.items() if role is not prepared.roles[name]]
    return Check(
        opset=opened.graph.opset_imports.get("", 0),
        producer=producer,
        output=tried.outputs[0],
        outputs=tried.outputs,
        losses=tried.fitting,
        obstacles=obstacles,
        remarks=(
            *exported,
            *noticed,
            *remark_on_untrained(prepared, tried.outputs, untrained),
            *unmixed,
            *unlisted,
        ),
        operators=_list_uses(prepared, {fault.node for fault in faults}),
        parameters=_count(prepared, roles, Role.PARAMETER),
        frozen=_count(prepared, roles, Role.FROZEN),
        untrained=sum(prepared.weights[name].size for name in untrained),
        statistics=_count(prepared, roles, Role.BUFFER) - carried,
        carried=carried,
        conditional=_count_conditional(prepared),
        layers=list_layers(prepared, doubts, roles),
        groups=_apply_groups(groups, list_trained(prepared, tried.outputs)),
        cuts=cuts,
        memory=estimate_memory(prepared, at, tail_at, tried.trained, batch) if wants_memory else (),
    )


def _apply_groups(
    groups: Sequence[ParameterGroup], parameters: Sequence[str]
) -> tuple[AppliedGroup, ...]:
    """List the parameters of each group, in the order in which the groups were given."""
    assigned = assign_groups(groups, parameters)
    return tuple(
        AppliedGroup(
            group=group,
            parameters=tuple(name for name in parameters if assigned.get(name) is group),
        )
        for group in groups
    )


@attribute_errors_to_pass("searched for what training would do unmeant")
def _list_remarks(
    prepared: PreparedModel, tried: TriedLosses, producer: str, trials: Trials
) -> tuple[dict[str, str], list[Remark]]:
    """Return why the roles of weights may be wrong, by name, and the remarks on a model."""
    computed, output = find_computed(prepared), tried.outputs[0]
    noticed = [
        *_note_stored(prepared),
        *remark_on_adapters(prepared),
        *_note_dequantized(prepared),
        *remark_on_kept(prepared),
        *remark_on_computed(computed),
        *remark_on_ties(prepared, computed),
        *remark_on_statistics(prepared),
        *remark_on_states(prepared, output),
        *remark_on_detaches(prepared),
        *remark_on_losses(prepared, tried),
        *remark_on_batches(prepared, output, producer, trials),
        *remark_on_conditional(prepared),
        *remark_on_precisions(prepared),
    ]
    noticed += note_batch(prepared, output, noticed)
    scalings = dict.fromkeys(prepared.kept_scalings, "scales or shifts a raw input")
    return computed | scalings, noticed


def _compare_samples(
    trials: Trials, prepared: PreparedModel
) -> tuple[tuple[str, ...], tuple[Remark, ...]]:
    """Return reasons to refuse a batch that the user freed, and remarks on freed batches."""
    try:
        notes = trials.compare(prepared)
    except (BatchNotFreed, MixedSamples) as error:
        return (str(error),), ()
    return (), tuple(Remark(kind=Kind.BATCH, sentence=note) for note in notes)


def _note_dequantized(prepared: PreparedModel) -> Sequence[Remark]:
    """Return a remark on arithmetic with integers that became arithmetic with floats."""
    found = prepared.dequantized
    if found is None:
        return ()
    return (Remark(kind=Kind.DEQUANTIZED, sentence=found.describe(), names=found.weights),)


def _note_stored(prepared: PreparedModel) -> Iterator[Remark]:
    """Yield remarks on the options that the model's file holds."""
    for note in describe_stored(prepared.stored, prepared.ignored):
        options = tuple(make_option(name, value) for name, value in note.options)
        yield Remark(
            kind=Kind.STORED_OPTIONS, sentence=note.sentence, names=note.names, options=options
        )


@attribute_errors_to_pass("searched for cuts")
def _list_cuts(
    prepared: PreparedModel, tried: TriedLosses
) -> tuple[tuple[CutCandidate, ...], tuple[Remark, ...]]:
    """List the cuts, or return no cuts and a remark if finding them would take too long.

    A model that cannot be trained has no cuts; :func:`check` reports the reason as an obstacle.
    """
    own = tuple(loss for loss in tried.trained if loss.kind == FROM_MODEL)
    try:
        return tuple(list_cuts(prepared, None, (), ReadOutputs(names=tried.outputs, own=own))), ()
    except (NotDifferentiable, UsageError):
        return (), ()
    except TooManyTries as error:
        return (), (Remark(kind=Kind.CUTS_NOT_LISTED, sentence=str(error)),)


@attribute_errors_to_pass("tried in training")
def _try_training(
    prepared: PreparedModel, tried: TriedLosses
) -> tuple[list[NotDifferentiable], tuple[str, ...]]:
    """Differentiate and lower the uncut model, and return the obstacles to training."""
    if not tried.trained:
        return [], tried.obstacles
    faults = list(_list_faults(prepared, tried.outputs))
    if faults:
        return faults, ()
    try:
        joint = build_training(prepared, (), (), tried.trained, graphs=tried.graphs)
        lower(joint.graph)
    except (ModelError, UsageError) as error:
        return [], (str(error),)
    return [], ()


def _list_faults(prepared: PreparedModel, outputs: Sequence[str]) -> Iterator[NotDifferentiable]:
    return list_undifferentiable(prepared.training.graph, prepared.trainable, outputs)


@attribute_errors_to_pass("searched for its operators")
def _list_uses(prepared: PreparedModel, faulty: set[str]) -> tuple[OperatorUse, ...]:
    """Count the model's nodes by operator and by how they are handled in training."""
    graph = prepared.training.graph
    trained = set(prepared.trainable)
    moving = find_moving(graph, [value for value in graph.inputs if value.name in trained])
    kept = {node.name: node for node in graph}

    def handle(node: ir.Node) -> Handling:
        if node.name in faulty:
            return Handling.OBSTACLE
        same = kept.get(node.name)
        if same is None or same.op_type != node.op_type:
            return Handling.REWRITTEN
        differentiated = any(value in moving for value in same.outputs)
        return Handling.NATIVE if differentiated else Handling.FORWARD

    counts = Counter((node.op_type, handle(node)) for node in prepared.skeleton.graph)
    return tuple(
        OperatorUse(operator=operator, handling=handling, nodes=nodes)
        for (operator, handling), nodes in sorted(counts.items())
    )


@attribute_errors_to_pass("searched for its conditional weights")
def _count_conditional(prepared: PreparedModel) -> int:
    held = [value.const_value for value in list_returned(prepared.skeleton.graph)]
    return sum(tensor.size for tensor in held if tensor is not None)


@attribute_errors_to_pass("searched for its weights")
def _count(prepared: PreparedModel, roles: Mapping[str, Role], role: Role) -> int:
    return sum(prepared.weights[name].size for name, own in roles.items() if own is role)
