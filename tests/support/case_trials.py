"""Node cases, each turned into a model that can be trained, and tried on both targets.

    python -m tests.support.case_trials OPERATOR...

A case's float inputs become parameters, all else constants; the loss is the sum of every numeric
output times a random tensor.  The model is prepared once and cut for each target, and loss and
gradients are held against ``case_oracles``.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from splitonnx.bundles import Bundle
from splitonnx.errors import NotDifferentiable, SplitonnxError, StageFailed
from splitonnx.manifests import KEY
from splitonnx.names import Target
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.graphs.traversals import find_moving, trace_gradients
from splitonnx.partitioner.normalization.parameters import TensorKind, classify_tensor
from splitonnx.partitioner.partitions import cut_prepared
from splitonnx.runtime.engine.engines import Engine
from tests.support.case_oracles import Arrays, Slopes, draw_data, expect
from tests.support.node_cases import (
    NodeCase,
    categorize_inputs,
    find_schema,
    is_float,
    is_tensors_only,
    list_node_cases,
    list_results,
)

RTOL = 1e-3
FLOOR = 1e-6
"""Gradients below this are zero: those of step functions, and of what normalizations cancel."""

STEP = "model.step.onnx"
TARGETS: tuple[Target, ...] = ("training", "portable")

_FLOATS = {"tensor(float)": np.float32, "tensor(double)": np.float64}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a case on one target.

    ``error`` is the relative error of the worst gradient entry, ``None`` where the case has
    nothing to differentiate; ``refusal`` is the sentence of the error that it met, and
    ``undifferentiable`` tells that it was for want of a gradient.  ``rewritten`` tells that the
    operator itself is not what was differentiated.  ``graph`` is the training stage that ran on
    ``feeds`` and gave ``found``.
    """

    case: str
    target: str
    parameters: tuple[str, ...] = ()
    error: float | None = None
    loss_error: float = 0.0
    refusal: str = ""
    undifferentiable: bool = False
    rewritten: bool = False
    worst: str = field(default="", compare=False)
    graph: bytes = field(default=b"", repr=False, compare=False)
    feeds: Arrays = field(default_factory=dict, repr=False, compare=False)
    found: Arrays = field(default_factory=dict, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether the model trained and its gradients and loss are right."""
        return not self.refusal and (self.error or 0.0) <= RTOL and self.loss_error <= RTOL


def build_problem(case: NodeCase) -> tuple[ModelProto, Arrays]:
    """Make a case trainable: inputs as initializers, and a loss; return the data that it takes.

    ``anchor`` is a parameter beside the case, so that one without floats can be trained, too.
    """
    model = ModelProto()
    model.CopyFrom(case.model)
    graph = model.graph
    model.ir_version = max(model.ir_version, 4)
    _raise_opset(case, model)
    del graph.input[:]
    for name, array in case.inputs.items():
        graph.initializer.append(_to_tensor(case, name, array))
    graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "anchor"))
    data = draw_data(case)
    terms = []
    for index, name in list_results(case):
        weight, shape = f"case.weight{index}", case.outputs[name].shape
        graph.input.append(helper.make_tensor_value_info(weight, TensorProto.FLOAT, shape))
        cast = f"case.float{index}"
        graph.node.append(helper.make_node("Cast", [name], [cast], to=TensorProto.FLOAT))
        graph.node.append(helper.make_node("Mul", [cast, weight], [f"case.product{index}"]))
        total = f"case.total{index}"
        graph.node.append(
            helper.make_node("ReduceSum", [f"case.product{index}"], [total], keepdims=0)
        )
        terms.append(total)
    data["case.scale"] = np.ones(1, np.float32)
    graph.input.append(helper.make_tensor_value_info("case.scale", TensorProto.FLOAT, [1]))
    graph.node.append(helper.make_node("Mul", ["anchor", "case.scale"], ["case.scaled"]))
    graph.node.append(helper.make_node("ReduceSum", ["case.scaled"], ["case.anchor"], keepdims=0))
    result = "case.anchor"
    for index, term in enumerate(terms):
        graph.node.append(helper.make_node("Add", [result, term], [f"case.sum{index}"]))
        result = f"case.sum{index}"
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, []))
    return model, data


def _raise_opset(case: NodeCase, model: ModelProto) -> None:
    """Let the loss be written in operators of opset 9 where that does not change the case's."""
    schema = find_schema(case)
    for entry in model.opset_import:
        if entry.domain == "" and entry.version < 9 and _is_unchanged(schema):
            entry.version = 9


def _is_unchanged(schema: onnx.defs.OpSchema) -> bool:
    newer: int = onnx.defs.get_schema(schema.name, 9, "").since_version
    return newer == schema.since_version


def _to_tensor(case: NodeCase, name: str, array: np.ndarray) -> TensorProto:
    value = next(value for value in case.model.graph.input if value.name == name)
    tensor = numpy_helper.from_array(np.asarray(array), name)
    tensor.data_type = value.type.tensor_type.elem_type
    return tensor


def try_case(case: NodeCase) -> Iterator[Outcome]:
    """Prepare a case once, and try it on both targets."""
    problem, data = build_problem(case)
    try:
        prepared = prepare(open_model(problem), train=_list_trained(problem))
    except SplitonnxError as error:
        yield from (_note_refusal(case, target, error) for target in TARGETS)
        return
    for target in TARGETS:
        yield _try_target(case, target, prepared, problem.graph.output[0].name, data)


def _note_refusal(case: NodeCase, target: Target, error: SplitonnxError) -> Outcome:
    return Outcome(
        case=case.name,
        target=target,
        refusal=str(error),
        undifferentiable=isinstance(error, NotDifferentiable),
    )


def _try_target(
    case: NodeCase, target: Target, prepared: PreparedModel, loss: str, data: Arrays
) -> Outcome:
    """Cut a case whole, run its step, and compare loss and gradients with the oracle."""
    try:
        bundle = cut_prepared(
            prepared, at=None, loss="from-model", output=loss,
            client_target=target, server_target=target,
        )  # fmt: skip
    except SplitonnxError as error:
        return _note_refusal(case, target, error)
    parameters = _list_parameters(set(prepared.trainable), case)
    expected = expect(case.operator, case.name, parameters)
    try:
        feeds, found = run_stage(bundle, {**data, **expected.weights})
    except StageFailed as error:
        return Outcome(case=case.name, target=target, refusal=f"FAILED: {error}")
    worst, where = None if not parameters else 0.0, ""
    for name in parameters:
        gradient = found.get(f"{name}_grad", np.zeros_like(expected.weights[name]))
        off, place = _compare(gradient, expected.slopes[name])
        if worst is None or off > worst:
            worst, where = off, f"{name}{place}"
    return Outcome(
        case=case.name,
        target=target,
        parameters=parameters,
        error=worst,
        loss_error=_compare_losses(float(found["loss"]), expected.loss, data),
        rewritten=case.operator not in _list_differentiated(prepared),
        worst=where,
        graph=bundle.client.graphs[STEP],
        feeds=feeds,
        found=found,
    )


def _list_differentiated(prepared: PreparedModel) -> set[str]:
    """List the operators through which gradients pass; a rewrite may keep one for its value."""
    graph = prepared.training.graph
    trained = [value for value in graph.inputs if value.name in prepared.trainable]
    passed = trace_gradients(graph.outputs) & find_moving(graph, trained)
    makers = (value.producer() for value in passed)
    return {node.op_type for node in makers if node is not None}


def _compare_losses(found: float, expected: float, data: Mapping[str, np.ndarray]) -> float:
    """Return the loss's error, relative to the sum of what it is made of."""
    if not np.isfinite(expected):
        return 0.0
    size = sum(float(np.abs(weight).sum(dtype=np.float64)) for weight in data.values())
    return abs(found - expected) / max(1.0, abs(expected), size)


def _compare(gradient: np.ndarray, slopes: Slopes) -> tuple[float, tuple[int, ...]]:
    """Return the relative error of the worst entry that was looked at, and where it is."""
    scale, errors = float(np.abs(gradient).max(initial=0.0)), []
    for index, expected in slopes:
        scale = max(scale, abs(expected))
        errors.append((abs(float(gradient[index]) - expected), index))
    worst, place = max(errors, default=(0.0, ()))
    return (0.0 if worst <= FLOOR else worst / scale), place


def _list_trained(problem: ModelProto) -> list[str]:
    """Return patterns for all that could be trained, also what is a constant as a rule."""
    model = open_model(problem)
    return [
        f"^{re.escape(name)}$"
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and value.const_value.dtype.bitwidth >= 16
        and len(value.const_value.shape)
        and classify_tensor(value, value.const_value).kind
        in (TensorKind.PARAMETER, TensorKind.CONSTANT)
    ]


def run_step(bundle: Bundle, feeds: Mapping[str, np.ndarray]) -> Arrays:
    """Run the whole model's training stage and return its outputs by name."""
    return run_stage(bundle, feeds)[1]


def run_stage(bundle: Bundle, feeds: Mapping[str, np.ndarray]) -> tuple[Arrays, Arrays]:
    """Run the whole model's training stage and return its inputs and its outputs by name."""
    engine = Engine(threads=1)
    stage = engine.load("step", bundle.client.graphs[STEP], training=True)
    known = {**bundle.client.weights, **feeds, KEY: np.array([0, 0, 0], np.int64)}
    wanted = {value.name: value.type for value in stage.session.get_inputs()}
    inputs = {
        name: known[name].astype(_FLOATS[kind]) if kind in _FLOATS else known[name]
        for name, kind in wanted.items()
    }
    found = engine.run(stage, {name: engine.from_array(array) for name, array in inputs.items()})
    return inputs, {name: np.array(engine.to_array(tensor)) for name, tensor in found.items()}


def _list_parameters(trained: Collection[str], case: NodeCase) -> tuple[str, ...]:
    categories = categorize_inputs(case)
    return tuple(
        name
        for name, array in case.inputs.items()
        if name in trained and categories.get(name) != "constant" and is_float(array)
    )


def try_cases(operators: Sequence[str]) -> Iterator[tuple[NodeCase, Outcome]]:
    """Try every case of tensors of the given operators on both targets."""
    for operator in operators:
        for case in list_node_cases(operator):
            if is_tensors_only(case):
                yield from ((case, outcome) for outcome in try_case(case))


def main(arguments: Sequence[str]) -> int:
    """Print a line a case; return 1 if one is wrong."""
    names = [argument for argument in arguments if not argument.startswith("-")]
    bad = 0
    for case, outcome in try_cases(names):
        bad += not (outcome.ok or outcome.refusal)
        state = "ok  " if outcome.ok else "no  " if outcome.refusal else "BAD "
        error = "none" if outcome.error is None else f"{outcome.error:.1e}"
        how = "rewritten" if outcome.rewritten else "native"
        print(
            f"{state} {case.operator:18} {outcome.target:8} {how:9} grad {error} "
            f"loss {outcome.loss_error:.1e} {outcome.worst} {case.name} {outcome.refusal}"
        )
    return int(bad > 0)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.exit(main(sys.argv[1:]))
