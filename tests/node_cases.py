"""The onnx package's own node test cases, each turned into a model that can be trained.

    python -m tests.node_cases [-v] OPERATOR...

A case's float inputs become parameters, all else constants; the loss is the sum of every numeric
output times a random tensor.  The model goes through :func:`cut` on both targets, and its
gradients are held against central differences in float64 that onnx.reference takes of the case as
the onnx package wrote it.  Nothing of splitonnx and nothing of ONNX Runtime is in that oracle.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnx.backend.test.case.test_case import TestCase

from splitonnx.bundles import Bundle
from splitonnx.errors import NotDifferentiable, SplitonnxError, StageFailed
from splitonnx.manifests import KEY
from splitonnx.partitioner.gates import open_model
from splitonnx.partitioner.partitions import Target, cut
from splitonnx.partitioner.preparations import prepare
from splitonnx.partitioner.uses import Kind, judge
from splitonnx.runtime.engines import Engine
from tests.oracles import differentiate_numerically, make_evaluator, to_double
from tests.own_cases import build_own_cases, evaluate_own

RTOL = 1e-3
FLOOR = 1e-6
"""Gradients below this are zero: those of step functions, and of what normalizations cancel."""

ENTRIES = 10
STEP = "model.step.onnx"
TARGETS: tuple[Target, ...] = ("training", "portable")
WEIGHTS = (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)

Arrays = dict[str, np.ndarray]

_FLOATS = {"tensor(float)": np.float32, "tensor(double)": np.float64}


@dataclass(frozen=True, kw_only=True)
class NodeCase:
    """One test case of the onnx package: a model of one node, and what goes into it."""

    name: str
    operator: str
    model: ModelProto
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


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


@cache
def list_node_cases(operator: str) -> tuple[NodeCase, ...]:
    """List the cases of one operator, without those that spell out its function's body.

    Float64 becomes float32.  So do integers, where an operator that differentiates has no case
    with floats.
    """
    cases = [case for case in _collect_cases() if case.operator == operator]
    doubles = [_make_float(case, {TensorProto.DOUBLE}) for case in cases]
    if any(_list_variables(case) for case in doubles):
        return tuple(doubles)
    return tuple(_make_float(case, _INTEGERS) for case in doubles)


_PIECEWISE_LINEAR = {"Ceil", "DFT", "Floor", "Round", "STFT", "Sign"}
"""Operators that their schema declares not differentiable, and that are."""

_INTEGERS = {TensorProto.INT32, TensorProto.INT64}


@cache
def _collect_cases() -> tuple[NodeCase, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases divide by zero on purpose
        from onnx.backend.test.case.node import collect_testcases

        found = collect_testcases(None)
    given = [_read_case(case) for case in found if "_expanded" not in case.name]
    own = [
        NodeCase(
            name=name,
            operator=operator,
            model=model,
            inputs=inputs,
            outputs={"y": evaluate_own(model, inputs)},
        )
        for name, operator, model, inputs in build_own_cases()
    ]
    return (*given, *own)


def _read_case(case: TestCase) -> NodeCase:
    model = case.model
    assert model is not None
    assert case.data_sets is not None
    inputs, outputs = case.data_sets[0]
    return NodeCase(
        name=case.name,
        operator=model.graph.node[0].op_type,
        model=model,
        inputs={v.name: _read_array(a) for v, a in zip(model.graph.input, inputs, strict=False)},
        outputs={v.name: _read_array(a) for v, a in zip(model.graph.output, outputs, strict=False)},
    )


def _read_array(value: object) -> np.ndarray:
    """Give a tensor as an array; what is none (a sequence, nothing) becomes one of objects."""
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    return np.array([value, None], object)[:1]


def _list_variables(case: NodeCase) -> list[str]:
    """Name the float inputs that the schema does not declare constants."""
    categories = _categorize_inputs(case)
    floats = [name for name, array in case.inputs.items() if _is_float(array)]
    return [name for name in floats if categories.get(name) != "constant"]


def _make_float(case: NodeCase, kinds: Collection[int]) -> NodeCase:
    """Declare as float32 what is of one of ``kinds`` and may be float32, input and output alike."""
    schema, node = _find_schema(case), _find_node(case)
    model = ModelProto()
    model.CopyFrom(case.model)
    declared = {v.name: v.type.tensor_type for v in (*model.graph.input, *model.graph.output)}
    rows = [(node.input, schema.inputs), (node.output, schema.outputs)]
    formals = [
        (name, formals[min(index, len(formals) - 1)])
        for names, formals in rows
        for index, name in enumerate(names)
        if name in declared
    ]
    variable = onnx.defs.OpSchema.DifferentiationCategory.Differentiable
    turned = {
        formal.type_str
        for name, formal in formals
        if declared[name].elem_type in kinds
        and "tensor(float)" in formal.types
        and formal.differentiation_category == variable
    }
    arrays = {**case.inputs, **case.outputs}
    for name, formal in formals:
        if formal.type_str in turned and declared[name].elem_type in kinds:
            declared[name].elem_type = TensorProto.FLOAT
            arrays[name] = arrays[name].astype(np.float32)
    return replace(
        case,
        model=model,
        inputs={name: arrays[name] for name in case.inputs},
        outputs={name: arrays[name] for name in case.outputs},
    )


def is_tensors_only(case: NodeCase) -> bool:
    """Whether all that goes in and comes out is a tensor of numbers or truth values."""
    values = (*case.model.graph.input, *case.model.graph.output)
    arrays = (*case.inputs.values(), *case.outputs.values())
    return all(v.type.HasField("tensor_type") for v in values) and all(
        a.dtype.kind not in "OSU" for a in arrays
    )


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
    random = np.random.default_rng(5)
    data: Arrays = {}
    terms = []
    for index, name in _list_results(case):
        array = case.outputs[name]
        weight = f"case.weight{index}"
        data[weight] = random.uniform(0.5, 1.5, array.shape).astype(np.float32)
        data[weight] *= random.choice(np.array([-1.0, 1.0], np.float32), array.shape)
        graph.input.append(helper.make_tensor_value_info(weight, TensorProto.FLOAT, array.shape))
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
    schema = _find_schema(case)
    for entry in model.opset_import:
        if entry.domain == "" and entry.version < 9 and _is_unchanged(schema):
            entry.version = 9


def _is_unchanged(schema: onnx.defs.OpSchema) -> bool:
    newer: int = onnx.defs.get_schema(schema.name, 9, "").since_version
    return newer == schema.since_version


def _list_results(case: NodeCase) -> list[tuple[int, str]]:
    """Number and name the outputs that the loss is made of.

    A float output that its schema declares not differentiable (a running statistic) is none.
    """
    schema = _find_schema(case)
    constant = onnx.defs.OpSchema.DifferentiationCategory.NonDifferentiable
    found = []
    for index, (name, array) in enumerate(case.outputs.items()):
        formal = schema.outputs[min(index, len(schema.outputs) - 1)]
        skipped = _is_float(array) and formal.differentiation_category == constant
        if array.size and not skipped:
            found.append((index, name))
    return found


def _find_node(case: NodeCase) -> onnx.NodeProto:
    nodes: list[onnx.NodeProto] = list(case.model.graph.node)
    return next(node for node in nodes if node.op_type == case.operator)


def _find_schema(case: NodeCase) -> onnx.defs.OpSchema:
    node = _find_node(case)
    version = next((e.version for e in case.model.opset_import if e.domain == node.domain), 1)
    return onnx.defs.get_schema(node.op_type, version, node.domain)


def _to_tensor(case: NodeCase, name: str, array: np.ndarray) -> TensorProto:
    value = next(value for value in case.model.graph.input if value.name == name)
    tensor = numpy_helper.from_array(np.asarray(array), name)
    tensor.data_type = value.type.tensor_type.elem_type
    return tensor


def try_case(case: NodeCase, target: Target) -> Outcome:
    """Cut a case whole, run its step, and compare loss and gradients with the oracle."""
    problem, data = build_problem(case)
    loss = problem.graph.output[0].name
    try:
        bundle = cut(
            problem, at=None, loss="from-model", output=loss, train=_list_trained(problem),
            client_target=target, server_target=target,
        )  # fmt: skip
        prepared = prepare(open_model(problem), train=_list_trained(problem))
    except SplitonnxError as error:
        return Outcome(
            case=case.name,
            target=target,
            refusal=str(error),
            undifferentiable=isinstance(error, NotDifferentiable),
        )
    parameters = _list_parameters(prepared.trainable, case)
    weights = _draw_weights(case, parameters)
    try:
        feeds, found = run_stage(bundle, {**data, **weights})
    except StageFailed as error:
        return Outcome(case=case.name, target=target, refusal=f"FAILED: {error}")
    expected = _measure_loss(case, {**case.inputs, **weights}, data)
    size = sum(float(np.abs(w * 1.0).sum()) for w in data.values()) or 1.0
    size = max(1.0, abs(expected), size if np.isfinite(expected) else 1.0)
    loss_error = abs(float(found["loss"]) - expected) / size if np.isfinite(expected) else 0.0
    worst, where = None if not parameters else 0.0, ""
    for name in parameters:
        gradient = found.get(f"{name}_grad", np.zeros_like(weights[name]))
        off, place = _compare(case, name, weights, data, gradient)
        if worst is None or off > worst:
            worst, where = off, f"{name}{place}"
    return Outcome(
        case=case.name,
        target=target,
        parameters=parameters,
        error=worst,
        loss_error=loss_error,
        rewritten=case.operator not in {node.op_type for node in prepared.training.graph},
        worst=where,
        graph=bundle.client.graphs[STEP],
        feeds=feeds,
        found=found,
    )


def _list_trained(problem: ModelProto) -> list[str]:
    """Give patterns for all that could be trained, also what is a constant as a rule."""
    model = open_model(problem)
    return [
        f"^{re.escape(name)}$"
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
        and value.const_value.dtype.is_floating_point()
        and value.const_value.dtype.bitwidth >= 16
        and len(value.const_value.shape)
        and judge(value, value.const_value).kind in (Kind.PARAMETER, Kind.CONSTANT)
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
    categories = _categorize_inputs(case)
    return tuple(
        name
        for name, array in case.inputs.items()
        if name in trained and categories.get(name) != "constant" and _is_float(array)
    )


def _categorize_inputs(case: NodeCase) -> dict[str, str]:
    """Tell of each input whether the operator's schema declares it not differentiable."""
    schema = _find_schema(case)
    constant = onnx.defs.OpSchema.DifferentiationCategory.NonDifferentiable
    linear = case.operator in _PIECEWISE_LINEAR
    found = {}
    for index, name in enumerate(_find_node(case).input):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        is_constant = formal.differentiation_category == constant and not linear
        found[name] = "constant" if is_constant else "variable"
    return found


def _draw_weights(case: NodeCase, parameters: Sequence[str]) -> Arrays:
    """Move every weight a little off the case's own value: away from ties, kinks and zeros."""
    random = np.random.default_rng(11)
    for width in (2e-2, 2e-3, 0.0):
        weights = {}
        for name in parameters:
            array = np.asarray(case.inputs[name], np.float64)
            shift = random.uniform(0.3, 1.0, array.shape) * random.choice([-1, 1], array.shape)
            weights[name] = (array + width * shift).astype(np.float32)
        if _is_inside(case, {**case.inputs, **weights}):
            break
    return weights


def _is_inside(case: NodeCase, inputs: Mapping[str, np.ndarray]) -> bool:
    """Whether the case is finite there, if it was finite where the onnx package put it."""
    outputs = [np.asarray(o) for o in evaluate(case, inputs)]
    return all(np.isfinite(o).all() for o in outputs if o.dtype.kind == "f")


def evaluate(case: NodeCase, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Evaluate a case in float64 by onnx.reference."""
    evaluator = _make_case_evaluator(case.operator, case.name)
    feeds = {n: np.asarray(a).astype(np.float64) if _is_float(a) else a for n, a in inputs.items()}
    results = evaluator.run(None, feeds)
    assert isinstance(results, list)
    return results


@cache
def _make_case_evaluator(operator: str, name: str) -> onnx.reference.ReferenceEvaluator:
    case = next(case for case in list_node_cases(operator) if case.name == name)
    return make_evaluator(to_double(case.model))


def _is_float(array: np.ndarray) -> bool:
    kind: str = np.asarray(array).dtype.name
    return kind.startswith(("float", "bfloat")) and not kind.startswith("float8")


def _measure_loss(
    case: NodeCase, inputs: Mapping[str, np.ndarray], data: Mapping[str, np.ndarray]
) -> float:
    total = 1.0  # the anchor
    outputs = evaluate(case, inputs)
    results = [outputs[index] for index, _ in _list_results(case)]
    weights = [weight for name, weight in data.items() if name != "case.scale"]
    for result, weight in zip(results, weights, strict=True):
        total += float(np.sum(np.asarray(result).astype(np.float64) * weight.astype(np.float64)))
    return total


def _compare(
    case: NodeCase,
    name: str,
    weights: Mapping[str, np.ndarray],
    data: Mapping[str, np.ndarray],
    gradient: np.ndarray,
) -> tuple[float, tuple[int, ...]]:
    """Give the relative error of the worst entry that was looked at, and where it is."""
    inputs = {**case.inputs, **{n: w.astype(np.float64) for n, w in weights.items()}}
    scale, errors = float(np.abs(gradient).max(initial=0.0)), []
    numeric = differentiate_numerically(
        lambda: _measure_loss(case, inputs, data), inputs[name], entries=ENTRIES
    )
    for index, expected in numeric:
        scale = max(scale, abs(expected))
        errors.append((abs(float(gradient[index]) - expected), index))
    worst, place = max(errors, default=(0.0, ()))
    return (0.0 if worst <= FLOOR else worst / scale), place


def try_cases(operators: Sequence[str]) -> Iterator[tuple[NodeCase, Outcome]]:
    """Try every case of tensors of the given operators on both targets."""
    for operator in operators:
        for case in list_node_cases(operator):
            if is_tensors_only(case):
                for target in TARGETS:
                    yield case, try_case(case, target)


def main(arguments: Sequence[str]) -> int:
    """Print a line a case; return 1 if one is wrong."""
    names = [argument for argument in arguments if not argument.startswith("-")]
    bad = 0
    for case, outcome in try_cases(names):
        bad += not outcome.ok
        state = "ok  " if outcome.ok else "BAD "
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
