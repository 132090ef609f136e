"""Turn inputs of a model into states that training carries from step to step.

A model may read its own output of the step before, such as a hidden state or a moving average.  The
input is then not data: it starts at zeros, or at the input's initial value if the file has one, and
each training step replaces it with the output of that step.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveInitializersFromInputsPass

from splitonnx.errors import UsageError, list_some
from splitonnx.manifests import Role
from splitonnx.partitioner.cutting.passes.work import Work
from splitonnx.partitioner.cutting.ports import declare
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.tensors import describe_dims

Pairs: TypeAlias = Mapping[str, str] | Sequence[tuple[str, str]]
"""The output and the input of each state, as a dictionary or as pairs."""


def list_pairs(states: Pairs) -> tuple[tuple[str, str], ...]:
    """Return the output and the input of each state as pairs."""
    items = states.items() if isinstance(states, Mapping) else states
    return tuple((output, source) for output, source in items)


def store_inputs(work: Work) -> None:
    """Turn inputs with stored values into initializers, except inputs that are states.

    Their names, types and shapes are noted, since one of them may be a state that nobody named.

    Raises:
        UsageError: as raised by :func:`declare_states`.
    """
    work.initial_states = declare_states(work.model.graph, work.states)
    work.stored_inputs = tuple(
        ir.Value(name=value.name, type=value.type, shape=value.shape)
        for value in work.model.graph.inputs
        if value.is_initializer() and value.uses()
    )
    RemoveInitializersFromInputsPass()(work.model)


def declare_states(
    graph: ir.Graph, pairs: Sequence[tuple[str, str]]
) -> dict[str, ir.TensorProtocol]:
    """Check the names of states, and return the initial values of those that have one.

    These values are removed from the graph, so that the inputs of all states are alike.

    Raises:
        UsageError: a name is not one of the model's outputs or inputs, or an input has two outputs.
    """
    inputs = {value.name or "": value for value in graph.inputs}
    outputs = {value.name or "": value for value in graph.outputs}
    stored: dict[str, ir.TensorProtocol] = {}
    taken: dict[str, str] = {}
    for output, source in pairs:
        option = f"--state {output}={source}"
        if output not in outputs or source not in inputs:
            raise UsageError(f"{option}: {_explain_unknown(output, source, inputs, outputs)}")
        if source in taken:
            raise UsageError(
                f"{option}: '{source}' gets the value of '{taken[source]}' already; leave one out"
            )
        taken[source] = output
        value = inputs[source]
        if value.const_value is not None and value.is_initializer():
            stored[source] = value.const_value
            graph.initializers.pop(source)
            value.const_value = None
    return stored


def _explain_unknown(
    output: str, source: str, inputs: Collection[str], outputs: Collection[str]
) -> str:
    if output in inputs and source in outputs:
        return f"write the output first, as --state {source}={output}"
    if output not in outputs:
        return f"the model has no output '{output}'; it has {list_some(outputs)}"
    return f"the model has no input '{source}'; it has {list_some(inputs)}"


def finish_states(work: Work) -> None:
    """Set the initial value and the role of each state, and check that its shape is fixed.

    Raises:
        UsageError: a state's shape is not fixed, its output has another shape or type, or no node
            reads it.
    """
    for output, source in work.states:
        tensor = _make_initial(work, output, source)
        work.masters = {**work.masters, source: tensor}
        work.roles = {**work.roles, source: Role.BUFFER}
        if source in work.initial_states:
            graph = work.model.graph
            value = next(value for value in graph.inputs if value.name == source)
            value.const_value = work.initial_states[source]
            graph.register_initializer(value)


def _make_initial(work: Work, output: str, source: str) -> ir.TensorProtocol:
    option = f"--state {output}={source}"
    given = map_values(work.model.graph)
    values = map_values(work.training.graph)
    value, made = values.get(source), values.get(output)
    if value is None or not value.uses():
        raise UsageError(f"{option}: no node reads '{source}', so nothing would be carried")
    if made is None:
        raise UsageError(f"{option}: '{output}' does not depend on the model's inputs")
    if given[source].dtype != given[output].dtype:
        raise UsageError(
            f"{option}: '{output}' is {given[output].dtype}, and '{source}' {given[source].dtype}; "
            "a state keeps its type"
        )
    shape = _read_shape(option, value)
    known = {s for v in work.training.graph.inputs for s in _list_sizes(v) if isinstance(s, str)}
    if (reason := _explain_shape(made, value, shape, known)) is not None:
        raise UsageError(f"{option}: {reason}")
    assert value.dtype is not None
    declare(value)  # refuses types that no party can keep
    dtype = value.dtype.numpy()
    tensor = work.initial_states.get(source)
    array = np.zeros(shape, dtype) if tensor is None else tensor.numpy().astype(dtype)
    return ir.tensor(array.reshape(shape), dtype=value.dtype, name=source)


def _read_shape(option: str, value: ir.Value) -> tuple[int, ...]:
    """Return the shape of a state's input.

    Raises:
        UsageError: the shape is not fixed.
    """
    if value.shape is None:
        raise UsageError(f"{option}: the rank of '{value.name}' is not known")
    sizes = _list_sizes(value)
    fixed = tuple(size for size in sizes if isinstance(size, int))
    if len(fixed) < len(sizes):
        options = _list_options(value)
        raise UsageError(
            f"{option}: '{value.name}' is {describe_shape(value)}, and a state is kept from step "
            f"to step, so its shape must be fixed, also the size of the batch; add {options}"
        )
    return fixed


def _list_options(value: ir.Value) -> str:
    """Return the options that would fix the sizes of an input."""
    names = [
        size or f"{value.name}:{axis}"
        for axis, size in enumerate(_list_sizes(value))
        if not isinstance(size, int)
    ]
    return " ".join(f"--dim {name}=SIZE" for name in dict.fromkeys(names))


def _explain_shape(
    made: ir.Value, value: ir.Value, shape: tuple[int, ...], known: Collection[str]
) -> str | None:
    """Return why an output cannot replace a state of this shape, or ``None`` if it can.

    ``known`` names the sizes of the model's inputs, which the user can fix.
    """
    sizes = None if made.shape is None else _list_sizes(made)
    if sizes is not None and tuple(sizes) == shape:
        return None
    both = f"'{made.name}' is {describe_shape(made)}, and '{value.name}' {describe_shape(value)}"
    if sizes is not None and all(isinstance(size, int) for size in sizes):
        return f"{both}; a state keeps its shape"
    symbols = [size for size in sizes or () if isinstance(size, str) and size in known]
    options = " ".join(f"--dim {name}=SIZE" for name in dict.fromkeys(symbols))
    advice = f"fix its sizes with {options}" if symbols else "export the model with fixed sizes"
    return f"{both}; a state keeps its shape, so that of the output must be known, too: {advice}"


def _list_sizes(value: ir.Value) -> list[int | str | None]:
    return [
        size if isinstance(size, int) else size.value and str(size.value)
        for size in value.shape or ()
    ]


def describe_shape(value: ir.Value) -> str:
    """Return a value's shape for a sentence, with a question mark for each unknown size."""
    if value.shape is None:
        return "of unknown shape"
    return describe_dims(_list_sizes(value))
