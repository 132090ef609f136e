"""Scalars get as many dimensions as the tensor beside them, where that makes a difference."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.partitioner.lowerings.kernels.chosen import build, choose, run


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("kind", ["Mul", "Sub", "Div", "Pow", "Max"])
def test_a_scalar_beside_a_tensor_that_ends_in_ones_gets_its_rank(
    kind: str, shape: tuple[int, ...]
) -> None:
    x = np.random.default_rng(0).uniform(1, 2, (3, 4, 1, 1)).astype(np.float32)
    arrays = {"x": x, "s": np.full(shape, 1.5, np.float32)}
    model = build(kind, arrays, ["y"])
    assert choose(model) == ["Reshape", kind]
    (reader,) = [node for node in model.graph if node.op_type == kind]
    fitted = reader.inputs[1]
    assert fitted is not None
    assert fitted.shape == ir.Shape([1, 1, 1, 1])
    functions = {
        "Mul": np.multiply, "Sub": np.subtract, "Div": np.divide, "Pow": np.power,
        "Max": np.maximum,
    }  # fmt: skip
    found = run(model, arrays)["y"]
    assert found.shape == x.shape
    np.testing.assert_allclose(found, functions[kind](x, np.float32(1.5)), rtol=1e-6)


def test_a_scalar_may_come_first() -> None:
    arrays = {"s": np.array(2, np.float32), "x": np.ones((3, 1), np.float32)}
    model = build("Div", arrays, ["y"])
    assert choose(model) == ["Reshape", "Div"]
    np.testing.assert_array_equal(run(model, arrays)["y"], np.full((3, 1), 2, np.float32))


@pytest.mark.parametrize(
    ("x", "other"),
    [
        ((3, 4, 1, 1), (4, 1, 1)),
        ((3, 4, 5, 5), ()),
        ((4,), ()),
        ((), ()),
        ((3, 4, 1, 1), (1, 1, 1, 1)),
        ((1,), (3, 4)),
    ],
)
def test_other_operands_stay_as_they_are(x: tuple[int, ...], other: tuple[int, ...]) -> None:
    arrays = {"x": np.ones(x, np.float32), "s": np.ones(other, np.float32)}
    assert choose(build("Add", arrays, ["y"])) == ["Add"]


def test_an_operator_that_is_not_elementwise_stays_as_it_is() -> None:
    arrays = {"x": np.ones((3, 4, 1), np.float32), "s": np.ones((1,), np.float32)}
    assert choose(build("MatMul", arrays, ["y"])) == ["MatMul"]
