"""The operators that the gate lets through: ONNX's own, and the gradient builder's."""

from __future__ import annotations

import onnx
import pytest

from splitonnx.operators import (
    AXES,
    DOMAINS,
    EQUATION,
    HIGHEST_IR_VERSION,
    HIGHEST_OPSET,
    KINDS,
    STANDARD_DOMAINS,
    STANDARD_OPERATORS,
    TRAINING_DOMAIN,
    TRAINING_ONLY,
    TRAINING_OPERATORS,
    WINDOWS,
)
from splitonnx.partitioner.lowerings import LOWERINGS


def test_the_operators_are_those_of_onnx_and_of_the_partitioners_lowerings() -> None:
    onnx_own = {
        schema.name
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.domain == "" and schema.since_version <= 21
    }
    assert onnx_own == STANDARD_OPERATORS
    assert LOWERINGS.keys() - STANDARD_OPERATORS <= TRAINING_OPERATORS
    assert LOWERINGS.keys() >= TRAINING_OPERATORS


def test_what_only_the_training_runtime_runs_is_part_of_what_the_gradient_builder_makes() -> None:
    assert TRAINING_ONLY < TRAINING_OPERATORS
    assert {"Gelu", "FusedMatMul"} <= TRAINING_OPERATORS - TRAINING_ONLY
    assert {"ConvGrad", "ReluGrad", "SoftmaxCrossEntropyLossGrad"} <= TRAINING_ONLY


def test_operators_that_run_code_of_others_are_in_no_list() -> None:
    known = STANDARD_OPERATORS | TRAINING_OPERATORS
    assert not known & {"PythonOp", "ATen", "EPContext", "TorchEmbedding", "ExecuteGraph"}


def test_domains_are_onnx_s_two_names_and_the_training_runtime_s() -> None:
    assert {"", "ai.onnx", TRAINING_DOMAIN} == DOMAINS
    assert TRAINING_DOMAIN not in STANDARD_DOMAINS


def test_the_highest_versions_are_those_that_the_training_runtime_takes() -> None:
    assert (HIGHEST_OPSET, HIGHEST_IR_VERSION) == (21, 10)


@pytest.mark.parametrize(
    "equation", ["ij,jk->ik", "...ij, ...jk -> ...ik", "i,i", "ii->", "", "abc->cba"]
)
def test_an_equation_of_letters_is_one(equation: str) -> None:
    assert EQUATION.fullmatch(equation.encode())


@pytest.mark.parametrize("equation", ["i1", "ij->->k", "i..j", "ij-jk", "i,j;k", "ij\n"])
def test_an_equation_in_which_inference_would_lose_its_way_is_none(equation: str) -> None:
    assert not EQUATION.fullmatch(equation.encode())


def test_every_attribute_of_windows_axes_and_kinds_is_one_of_some_operator_s() -> None:
    declared = {
        attribute
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.domain == ""
        for attribute in schema.attributes
    }
    assert declared >= WINDOWS
    assert declared >= AXES
    assert declared >= KINDS
