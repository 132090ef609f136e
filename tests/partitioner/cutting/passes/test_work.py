"""The state that the passes share starts empty."""

from __future__ import annotations

from splitonnx.partitioner.cutting.passes.work import Fact, Pass, Work
from splitonnx.partitioner.gate.gates import open_model
from tests.support.zoo import ZOO


def test_the_forms_are_the_training_form_and_the_inference_form() -> None:
    first, second = (open_model(ZOO["chain"].build()) for _ in range(2))
    work = Work(model=first, forms=(first, second))
    assert work.training is first
    assert work.inference is second


def test_a_pass_requires_and_ensures_nothing_by_default() -> None:
    step = Pass(work="left alone", run=lambda work: None)
    assert step.requires == step.ensures == step.spoils == Fact(0)
