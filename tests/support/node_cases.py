"""The onnx package's own node test cases, with a few of our own where it has none.

It reads them and says what of them may be differentiated; it differentiates nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.backend.test.case.test_case import TestCase

from tests.support.own_cases import build_own_cases, evaluate_own


@dataclass(frozen=True, kw_only=True)
class NodeCase:
    """One test case of the onnx package: a model of one node, and what goes into it."""

    name: str
    operator: str
    model: ModelProto
    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]


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
    """Return a tensor as an array; what is none (a sequence, nothing) becomes one of objects."""
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    return np.array([value, None], object)[:1]


def _list_variables(case: NodeCase) -> list[str]:
    """Name the float inputs that the schema does not declare constants."""
    categories = categorize_inputs(case)
    floats = [name for name, array in case.inputs.items() if is_float(array)]
    return [name for name in floats if categories.get(name) != "constant"]


def _make_float(case: NodeCase, kinds: Collection[int]) -> NodeCase:
    """Declare as float32 what is of one of ``kinds`` and may be float32, input and output alike."""
    schema, node = find_schema(case), find_node(case)
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


def find_node(case: NodeCase) -> onnx.NodeProto:
    nodes: list[onnx.NodeProto] = list(case.model.graph.node)
    return next(node for node in nodes if node.op_type == case.operator)


def find_schema(case: NodeCase) -> onnx.defs.OpSchema:
    node = find_node(case)
    version = next((e.version for e in case.model.opset_import if e.domain == node.domain), 1)
    return onnx.defs.get_schema(node.op_type, version, node.domain)


def list_results(case: NodeCase) -> list[tuple[int, str]]:
    """Number and name the outputs that the loss is made of.

    A float output that its schema declares not differentiable (a running statistic) is none.
    """
    schema = find_schema(case)
    constant = onnx.defs.OpSchema.DifferentiationCategory.NonDifferentiable
    found = []
    for index, (name, array) in enumerate(case.outputs.items()):
        formal = schema.outputs[min(index, len(schema.outputs) - 1)]
        skipped = is_float(array) and formal.differentiation_category == constant
        if array.size and not skipped:
            found.append((index, name))
    return found


def categorize_inputs(case: NodeCase) -> dict[str, str]:
    """Check of each input whether the operator's schema declares it not differentiable."""
    schema = find_schema(case)
    constant = onnx.defs.OpSchema.DifferentiationCategory.NonDifferentiable
    linear = case.operator in _PIECEWISE_LINEAR
    found = {}
    for index, name in enumerate(find_node(case).input):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        is_constant = formal.differentiation_category == constant and not linear
        found[name] = "constant" if is_constant else "variable"
    return found


def is_float(array: np.ndarray) -> bool:
    kind: str = np.asarray(array).dtype.name
    return kind.startswith(("float", "bfloat")) and not kind.startswith("float8")
