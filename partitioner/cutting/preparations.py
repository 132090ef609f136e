"""Prepare a model for cutting: build its training form and its inference form.

The table in :mod:`passes` lists the steps in the order in which they run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
import onnx_ir as ir

from splitonnx.errors import UsageError, count_some
from splitonnx.layers import Mixing
from splitonnx.manifests import KEY, Role
from splitonnx.names import BatchNormModes, DropoutMode
from splitonnx.partitioner.adapters import read_note
from splitonnx.partitioner.cutting.passes.given_names import naming_as_given
from splitonnx.partitioner.cutting.passes.joined_statistics import Separation
from splitonnx.partitioner.cutting.passes.passes import PASSES
from splitonnx.partitioner.cutting.passes.stored_options import (
    NONE_STORED,
    NOTHING,
    Ignored,
    StoredOptions,
    read_stored,
    select_stored,
)
from splitonnx.partitioner.cutting.passes.work import Work
from splitonnx.partitioner.gate.adjustments import NONE, Adjustments
from splitonnx.partitioner.graphs.faults import attribute_errors_to_pass
from splitonnx.partitioner.graphs.traversals import (
    describe_layer,
    find_dependents,
    find_movers,
    is_float,
    map_values,
    walk_back,
)
from splitonnx.partitioner.inference.evaluations import WeightValues
from splitonnx.partitioner.normalization.batchnorms import trace_statistic
from splitonnx.partitioner.normalization.constants.kept import Kept, find_numbers
from splitonnx.partitioner.normalization.dequantized.replacements import Dequantization
from splitonnx.partitioner.normalization.parameters import find_input_scalings
from splitonnx.partitioner.normalization.weights import (
    EVERYTHING,
    find_matches,
    make_pattern,
    pin_names,
    read_array,
)


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A model in two forms, ``training`` and ``inference``, whose weights became graph inputs.

    Both forms are made from ``skeleton``, which is the model with its weights as graph inputs and
    with all of its outputs.  The two forms keep only the outputs that depend on the model's inputs.
    ``weights`` holds the tensors that became graph inputs, in the model's order, and ``roles`` maps
    each name to the weight's role.  ``next_buffers`` maps each running statistic to the value in
    ``training`` that replaces it after a step.  ``given`` holds the names of the tensors and nodes
    of the user's model, with its functions inlined.  ``constants`` are not trained, but may have
    been learned (:mod:`kept`).  ``freed`` names the nodes whose fixed batch
    size of 1 was replaced by that of the data (:mod:`batches`).  ``decided`` names the If nodes
    that were replaced by their branch for larger batches (:mod:`batch_decisions`).
    ``separations`` lists the running statistics that got tensors of their own
    (:mod:`joined_statistics`).  ``dequantized`` describes the arithmetic with integers that was
    replaced.  ``adapters`` names the matrices of the model's adapters; if there are any, no other
    weight is trained unless ``train`` names it.  ``stored_inputs`` are the inputs for which the
    file has values, except states: they are weights or constants.  ``stored`` are the options from
    the model's file that were applied, and ``ignored`` what of these options has no effect
    (:mod:`stored_options`).  The other fields are the options that :func:`prepare` was called with,
    with the stored options added.

    A cut works on copies of the forms, so a prepared model can be cut any number of times.
    """

    training: ir.Model
    inference: ir.Model
    skeleton: ir.Model
    weights: Mapping[str, ir.TensorProtocol]
    roles: Mapping[str, Role]
    next_buffers: Mapping[str, str]
    given: frozenset[str] = frozenset()
    constants: tuple[Kept, ...] = ()
    freed: tuple[str, ...] = ()
    decided: tuple[str, ...] = ()
    separations: tuple[Separation, ...] = ()
    adapters: tuple[str, ...] = ()
    dequantized: Dequantization | None = None
    batchnorm: BatchNormModes = None
    dropout: DropoutMode | None = None
    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    adjustments: Adjustments = NONE
    ties: tuple[tuple[str, str], ...] = ()
    stop_gradients: tuple[str, ...] = ()
    states: tuple[tuple[str, str], ...] = ()
    stored_inputs: tuple[ir.Value, ...] = ()
    stored: StoredOptions = NONE_STORED
    ignored: Ignored = NOTHING

    @cached_property
    def state(self) -> frozenset[str]:
        """Names of the graph inputs that are not data: weights, and the key of random numbers."""
        return frozenset({*self.weights, KEY})

    @cached_property
    def trainable(self) -> tuple[str, ...]:
        """Names of the trained parameters, in the model's order."""
        return tuple(name for name, role in self.roles.items() if role is Role.PARAMETER)

    @cached_property
    def value_layers(self) -> frozenset[str]:
        """Names of the weights of which no layer passes on its data's numbers, scaled at most."""
        return frozenset(n for n in self._own_weights if not self._mixing.keeps_values(n))

    @cached_property
    def gradient_layers(self) -> frozenset[str]:
        """Names of the weights of which no layer only scales and permutes gradients."""
        return frozenset(n for n in self._own_weights if not self._mixing.keeps_gradients(n))

    @cached_property
    def carried(self) -> Mapping[str, str]:
        """Map the input of each state that training carries on to the output that replaces it."""
        return {source: output for output, source in self.states}

    @property
    def _own_weights(self) -> list[str]:
        """List the weights without the states, which hold what was computed from data."""
        return [name for name in self.weights if name not in self.carried]

    @cached_property
    def value_scalings(self) -> frozenset[str]:
        """Names of values, computed from weights alone, of which no layer mixes its data.

        A layer that reads such a value passes on its data's numbers, scaled at most.
        """
        return frozenset(filter(self._mixing.keeps_values, self._computed_weights))

    @cached_property
    def gradient_scalings(self) -> frozenset[str]:
        """Names of values, computed from weights alone, that only scale and permute gradients."""
        return frozenset(filter(self._mixing.keeps_gradients, self._computed_weights))

    @cached_property
    def _computed_weights(self) -> list[str]:
        graph = self.inference.graph
        data = [value for value in graph.inputs if value.name not in self.weights]
        moving = {value.name for value in find_dependents(graph, data)}
        moving.update(value.name for value in data)
        return [n for n in self._mixing.list_read() if n not in moving and n not in self.weights]

    @cached_property
    def _mixing(self) -> Mixing:
        def read(name: str) -> np.ndarray | None:
            return read_array(self.weights[name]) if name in self.weights else None

        graph = self.inference.graph
        return Mixing(map(describe_layer, graph), WeightValues(graph, read).read)

    @cached_property
    def kept_scalings(self) -> tuple[str, ...]:
        """Names of the weights that are not trained because they only normalize a raw input.

        In a model with adapters there are none, because no weight is trained anyway.
        """
        if self.adapters:
            return ()
        found = find_input_scalings(self.skeleton.graph, self.weights, self.carried)
        return tuple(name for name in found if self.roles[name] is Role.FROZEN)

    @cached_property
    def kept_numbers(self) -> tuple[str, ...]:
        """Names of single numbers that may have been learned, but are not trained unless named.

        Those about which the user or the model's file decided are left out.  In a model with
        adapters there are none.
        """
        told = {kept.name for kept in self.constants}
        found = [n for n in find_numbers(self.skeleton.graph) if n in self.given - told]
        return tuple(self._leave_undecided(found))

    @cached_property
    def kept_constants(self) -> tuple[Kept, ...]:
        """Constants that may have been learned in spite of their role, but are not trained.

        The same ones as of single numbers are left out.
        """
        undecided = self._leave_undecided([kept.name for kept in self.constants])
        return tuple(kept for kept in self.constants if kept.name in undecided)

    def _leave_undecided(self, names: Sequence[str]) -> list[str]:
        """Return the constants about which neither the user nor the model's file decided."""
        if self.adapters:
            return []
        decided = {*read_stored(self.skeleton).freeze, *self.adjustments.bindings}
        for pattern in self.freeze:
            decided |= find_matches(pattern, names, "--freeze")
        return [name for name in names if name not in decided]


def prepare(
    model: ir.Model,
    *,
    batchnorm: BatchNormModes = None,
    dropout: DropoutMode | None = None,
    train: Sequence[str] = (),
    freeze: Sequence[str] = (),
    adjustments: Adjustments = NONE,
    ties: Sequence[tuple[str, str]] = (),
    stop_gradients: Sequence[str] = (),
    states: Sequence[tuple[str, str]] = (),
) -> PreparedModel:
    """Prepare a model that passed the gate, by running the passes in :data:`PASSES` in order.

    The passes change ``model`` itself, so do not use it afterwards.  ``batchnorm`` and ``dropout``
    override the modes set in the model.  ``train`` and ``freeze`` are regular expressions for
    parameter names (``re.search``).  Parameters that match ``train`` are trained
    (:func:`weights.lift_weights`), and parameters that match ``freeze`` keep their value; ``train``
    takes precedence.  If the model has adapters (:mod:`adapters`), only these are trained, except
    those that ``freeze`` matches, and what ``train`` matches.  ``adjustments`` are the changes that
    were already made to the model's inputs; inputs bound by them are not trained.  If they ask for
    it, integer arithmetic is replaced.  ``ties`` are pairs of parameters to merge (:mod:`ties`).
    ``stop_gradients`` names tensors through which no gradient passes (:mod:`gradient_stops`).
    ``states`` are pairs of an output and the input that it replaces after each step
    (:mod:`carried_states`).  Options that the model's file holds are applied as well, where the
    user and adapters do not decide otherwise (:mod:`stored_options`).

    Raises:
        UnknownTensor: a name in ``ties`` or ``stop_gradients`` matches nothing.
        UnsupportedModel: the model's operators cannot be converted to an opset from 18 to 21; or a
            pattern matches no parameter, or only parameters that cannot be trained.
        UsageError: a pattern is not a regular expression; or a pattern of ``freeze`` matches only
            parameters that ``train`` selects; or ``ties``, ``stop_gradients`` or ``states`` cannot
            be applied.
    """
    note = read_note(model)
    adapters = () if note is None else note.names
    stored, ignored = select_stored(read_stored(model), model.graph, train, freeze)
    if adapters:  # of the weights, nothing else is trained unless the user says so
        stored = msgspec.structs.replace(stored, freeze=(), train=())
    work = Work(
        model=model,
        batchnorm=batchnorm,
        dropout=dropout,
        train=(*train, *pin_names(stored.train), *_match_adapters(adapters, freeze)),
        freeze=(*freeze, EVERYTHING) if adapters else freeze,
        bound=adjustments.bindings,
        chosen_sizes=adjustments.chosen_sizes,
        ties=ties,
        stop_gradients=stop_gradients,
        states=states,
        stored=stored,
        ignored=ignored,
        dequantize=adjustments.dequantize,
    )
    for step in PASSES:
        with naming_as_given(work.given), attribute_errors_to_pass(step.work):
            step.run(work)
    applied = _find_applied(work)
    return PreparedModel(
        training=work.training,
        inference=work.inference,
        skeleton=work.model,
        weights=work.masters,
        roles=work.roles,
        next_buffers=work.buffers,
        given=work.given,
        constants=tuple(work.constants),
        freed=tuple(work.freed),
        decided=tuple(work.decided),
        separations=tuple(work.separations),
        adapters=adapters,
        dequantized=work.dequantized,
        batchnorm=batchnorm,
        dropout=dropout,
        train=(*train, *pin_names(applied.train)),
        freeze=(*freeze, *pin_names(applied.freeze)),
        adjustments=adjustments,
        ties=tuple(ties),
        stop_gradients=(*stop_gradients, *applied.stop_gradients),
        states=tuple(states),
        stored_inputs=work.stored_inputs,
        stored=applied,
        ignored=work.ignored,
    )


def _match_adapters(adapters: Sequence[str], freeze: Sequence[str]) -> Sequence[str]:
    """Return a pattern for the adapters that no pattern of ``freeze`` matches, if there are any."""
    frozen = {name for text in freeze for name in find_matches(text, adapters, "--freeze")}
    kept = [name for name in adapters if name not in frozen]
    return (make_pattern(kept),) if kept else ()


def _find_applied(work: Work) -> StoredOptions:
    """Return the options from the model's file that changed the roles of weights, or gradients."""
    return msgspec.structs.replace(
        work.stored,
        freeze=tuple(name for name in work.stored.freeze if name in work.roles),
        train=tuple(name for name in work.stored.train if name in work.roles),
    )


def describe_adapters(prepared: PreparedModel) -> str:
    """Return a sentence that says what is trained of a model with adapters, or an empty string."""
    if not prepared.adapters:
        return ""
    trained = [name for name in prepared.trainable if name in prepared.adapters]
    others = [name for name in prepared.trainable if name not in prepared.adapters]
    statistics = [n for n in prepared.next_buffers if prepared.roles.get(n) is Role.BUFFER]
    if trained:
        told = f"the model has adapters, and only these are trained: {count_some(trained)}"
        told += f", and beside them {count_some(others)}" if others else ""
    else:
        told = "the model has adapters, which are frozen"
        told += f", and only these are trained: {count_some(others)}" if others else ""
    told += "; --train REGEX trains other weights as well"
    if statistics:
        told += (
            f"; the running statistics {count_some(statistics)} are updated, which a file of "
            "adapters does not hold; --batchnorm frozen keeps them"
        )
    return told


@attribute_errors_to_pass("searched for the output of the loss")
def choose_output(prepared: PreparedModel, output: str | None) -> str:
    """Return the name of the output from which the loss is computed.

    This is ``output`` if it is given.  Otherwise it is the first float output, or the first output
    if none is a float; outputs of states come last.

    Raises:
        UsageError: the model has no such output, the output does not depend on the model's inputs,
            or no output does.
    """
    predicted = {value.name for value in prepared.inference.graph.outputs}
    outputs = [v for v in prepared.training.graph.outputs if v.name in predicted]
    known = [value.name or "" for value in outputs]
    if not known:
        raise UsageError("the model has no output that depends on its inputs")
    if output is not None and output not in known:
        if any(value.name == output for value in prepared.skeleton.graph.outputs):
            raise UsageError(
                f"output '{output}' does not depend on the model's inputs, so nothing can be "
                f"learned from it; choose one of {', '.join(known)}"
            )
        raise UsageError(f"the model has no output '{output}'; it has {', '.join(known)}")
    carried = set(prepared.carried.values())
    outputs.sort(key=lambda value: (value.name in carried, not is_float(value)))
    return output or outputs[0].name or ""


@attribute_errors_to_pass("searched for what the loss trains")
def find_roles(prepared: PreparedModel, outputs: Sequence[str]) -> dict[str, Role]:
    """Return the role of each weight if the losses are computed from ``outputs``.

    These are the roles in a bundle: parameters that get no gradient from the outputs, and running
    statistics on which neither the outputs nor a state depends, are frozen.
    """
    values = map_values(prepared.training.graph)
    ends = [values[output] for output in outputs]
    reached = {value.name for value in find_movers(ends)}
    states = [values[made] for made in prepared.carried.values() if made in values]
    needed, _ = walk_back([*ends, *states])

    def changes(name: str, role: Role) -> bool:
        if name in prepared.carried:
            return True
        if role is Role.BUFFER:
            return trace_statistic(values.get(prepared.next_buffers[name]), needed) is not None
        return role is not Role.PARAMETER or name in reached

    return {
        name: role if changes(name, role) else Role.FROZEN for name, role in prepared.roles.items()
    }


def count_trained(prepared: PreparedModel, outputs: Sequence[str]) -> dict[str, int]:
    """Map each parameter to the number of elements that are trained by losses on ``outputs``.

    This is 0 for a parameter that gets no gradient from the outputs.
    """
    roles = find_roles(prepared, outputs)
    return {
        name: prepared.weights[name].size if roles[name] is Role.PARAMETER else 0
        for name in prepared.trainable
    }


def list_trained(prepared: PreparedModel, outputs: Sequence[str]) -> list[str]:
    """List the parameters that losses on ``outputs`` train."""
    roles = find_roles(prepared, outputs)
    return [name for name, role in roles.items() if role is Role.PARAMETER]
