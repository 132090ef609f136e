"""Only parameters of equal numbers are joined; tests/cases/test_lost_ties.py trains them."""

from __future__ import annotations

import pytest
from onnx import numpy_helper

from splitonnx.errors import UsageError
from splitonnx.partitioner.partitions import cut
from tests.support.small_models import load_model

NAME = "30_lost_tie"
KEPT, DROPPED = "shared.weight", "onnx::MatMul_1430"
TIE = ((KEPT, DROPPED),)


def test_parameters_whose_numbers_differ_are_not_joined() -> None:
    model = load_model(NAME)
    (dropped,) = [t for t in model.graph.initializer if t.name == DROPPED]
    array = numpy_helper.to_array(dropped).copy()
    array[0, 0] += 0.5
    dropped.CopyFrom(numpy_helper.from_array(array, DROPPED))
    with pytest.raises(UsageError, match=r"their numbers differ by up to 5\.0e-01"):
        cut(model, at=None, ties=TIE)


def test_parameters_of_other_shapes_are_not_joined() -> None:
    with pytest.raises(UsageError, match=r"their shapes are \[8, 6\] and \[6, 6\]"):
        cut(load_model(NAME), at=None, ties=((KEPT, "w1"),))


def test_an_unknown_parameter_is_named_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"no parameter .*did you mean 'shared\.weight'"):
        cut(load_model(NAME), at=None, ties=(("shared.wait", DROPPED),))


def test_a_parameter_is_not_joined_with_itself() -> None:
    with pytest.raises(UsageError, match="twice"):
        cut(load_model(NAME), at=None, ties=((KEPT, KEPT),))
