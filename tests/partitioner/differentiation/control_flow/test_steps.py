"""A step of a Scan as a model of its own, and what its backward step reads and computes."""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.differentiation.control_flow.forward import supply_gradients
from splitonnx.partitioner.differentiation.control_flow.steps import (
    DerivedStep,
    Step,
    differentiate_step,
    open_step,
)
from tests.partitioner.differentiation.control_flow.scan_models import read, write_scan

LINEAR = "m = Gemm (a, w, b)  n = Tanh (m)  y = Mul (n, p)"


def open_first(step: str) -> Step:
    model = read(write_scan(step), [])
    node = next(node for node in model.graph if node.op_type == "Scan")
    return open_step(node, "own", model.graph.opset_imports, 9)


def derive(step: str, moving: str, ends: str = "ny") -> DerivedStep:
    """Differentiate a step to the values whose letters are in ``moving``."""
    opened = open_first(step)
    named = dict(zip("ab", [*opened.states, *opened.rows], strict=True))
    named |= {value.name or "": own for own, value in opened.held.items()}
    outputs = dict(zip("ny", [*opened.nexts, *opened.shown], strict=True))
    return differentiate_step(
        opened, [named[n] for n in moving], [outputs[n] for n in ends], supply_gradients
    )


def list_kinds(nodes: list[ir.Node]) -> list[str]:
    return [node.op_type for node in nodes if node.op_type not in ("Identity", "Sum")]


def test_a_step_holds_what_it_reads_around_the_scan() -> None:
    step = open_first(LINEAR)
    assert [value.name for value in step.held.values()] == ["w", "p"]
    assert [len(v) for v in (step.states, step.rows, step.nexts, step.shown)] == [1, 1, 1, 1]
    assert all((value.name or "").startswith("own/") for value in step.model.graph.inputs)
    assert all(value.shape is not None for value in step.nexts)


def test_weights_of_a_product_get_their_gradient_outside_of_the_step() -> None:
    derived = derive(LINEAR, "w")
    (product,) = derived.products
    assert not product.transposed
    assert set(derived.gradients) == {"own/0", product.result.name}
    assert list_kinds(list(derived.backward)).count("Gemm") == 1


def test_weights_that_are_also_read_otherwise_get_it_in_the_step() -> None:
    derived = derive("m = Gemm (a, w)  k = ReduceSum (w)  t = Add (m, k)  n = Tanh (t)  "
                     "q = Mul (n, b)  y = Mul (q, p)", "w")  # fmt: skip
    assert not derived.products
    assert any("held" in name for name in derived.gradients)


def test_the_backward_step_computes_nothing_again() -> None:
    derived = derive(LINEAR, "wp")
    assert "Tanh" not in list_kinds(list(derived.backward))
    kinds = {value.producer().op_type for value in derived.stash if value.producer()}  # type: ignore[union-attr]
    assert "Tanh" in kinds


def test_the_backward_step_computes_again_what_cannot_be_stacked() -> None:
    """Each step chooses as many numbers as are positive in its row."""
    derived = derive("z = Constant <value = float {0.0}> ()  f = Greater (b, z)  c = NonZero (f)  "
                     "d = Transpose (c)  m = Mul (a, p)  g = GatherND (m, d)  t = Exp (g)  "
                     "r = ReduceSum (t)  n = Add (a, r)  y = Identity (n)", "p")  # fmt: skip
    kinds = list_kinds(list(derived.backward))
    assert {"Exp", "GatherND"} <= set(kinds)
    assert "Exp" not in {value.producer().op_type for value in derived.stash if value.producer()}  # type: ignore[union-attr]


def test_a_state_gets_a_gradient_once_it_depends_on_something_trained() -> None:
    assert "own/0" in derive(LINEAR, "b").gradients
    assert "own/0" not in derive("m = Mul (b, p)  n = Tanh (m)  y = Gemm (b, w, a)", "w").gradients


def test_a_state_that_only_a_later_step_reads_is_an_end() -> None:
    """The loss reads only the rows, but the next step reads the state."""
    derived = derive(LINEAR, "w", "y")
    names = [value.name for value in derived.graph.inputs]
    assert {"own/result/0_grad", "own/result/1_grad"} <= set(names)
