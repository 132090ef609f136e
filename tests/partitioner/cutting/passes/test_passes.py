"""The table of passes: its order meets what each requires, and each ensures what it says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest

from splitonnx.errors import InternalModelError
from splitonnx.manifests import KEY
from splitonnx.partitioner.cutting import preparations
from splitonnx.partitioner.cutting.passes.passes import PASSES
from splitonnx.partitioner.cutting.passes.work import Fact, Pass, Work
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.graphs.traversals import find_moving, list_nodes
from splitonnx.partitioner.rewrites import REWRITES
from tests.support.zoo import ZOO


def find_unmet(passes: Sequence[Pass]) -> list[str]:
    """Find the passes that require what does not hold when they come."""
    unmet, facts = [], Fact(0)
    for step in passes:
        if step.requires & ~facts:
            unmet.append(step.work)
        facts = (facts & ~step.spoils) | step.ensures
    return unmet


def test_the_order_meets_what_each_pass_requires() -> None:
    assert find_unmet(PASSES) == []


@pytest.mark.parametrize("index", range(len(PASSES)), ids=lambda index: PASSES[index].work)
def test_a_pass_comes_after_those_that_ensure_what_it_requires(index: int) -> None:
    step, others = PASSES[index], [*PASSES[:index], *PASSES[index + 1 :]]
    assert (step.work in find_unmet([step, *others])) is bool(step.requires)


@pytest.mark.parametrize("fact", Fact)
def test_a_fact_is_ensured_by_a_pass_and_mostly_required_by_a_later_one(fact: Fact) -> None:
    makers = [index for index, step in enumerate(PASSES) if fact in step.ensures]
    readers = [index for index, step in enumerate(PASSES) if fact in step.requires]
    assert makers
    assert not readers or makers[0] < readers[0]
    assert readers or fact in Fact.SHAPED


def test_every_pass_has_words_of_its_own() -> None:
    assert len({step.work for step in PASSES}) == len(PASSES)


# --- what holds ---------------------------------------------------------------------------------


def has_typed_outputs(graph: ir.Graph) -> bool:
    return all(v.type is not None for node in graph for v in node.outputs if v.name and v.uses())


def list_random(graph: ir.Graph) -> list[str]:
    kinds = {"Dropout", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "RandomNormal"}
    return [node.name or "" for node in graph if node.op_type in kinds]


def list_rough(work: Work) -> list[str]:
    """List the nodes behind a trained weight that are due for a rewrite still."""
    trained = [v for v in work.training.graph.inputs if v.name in work.roles]
    moving = find_moving(work.training.graph, trained)
    kinds = {"Elu", "Selu", "Softplus", "PRelu", "Sum", "Mean", "Einsum", "InstanceNormalization"}
    assert kinds <= REWRITES.keys()
    nodes = [node for node in work.training.graph if node.op_type in kinds]
    return [node.name or "" for node in nodes if set(node.inputs) & moving]


CHECKS: dict[Fact, Callable[[Work], bool]] = {
    Fact.INLINED: lambda work: not work.model.functions,
    Fact.STORED: lambda work: not any(v.is_initializer() for v in work.model.graph.inputs),
    Fact.NAMED: lambda work: (
        all(n.name for n in work.model.graph)
        and len({n.name for n in work.model.graph}) == len(work.model.graph)
    ),
    Fact.LIFTED: lambda work: (
        bool(work.weights) and work.weights.keys() <= {v.name for v in work.model.graph.inputs}
    ),
    Fact.ADAPTED: lambda work: 18 <= work.model.opset_imports[""] <= 21,
    Fact.TYPED: lambda work: all(has_typed_outputs(m.graph) for m in work.forms or (work.model,)),
    Fact.PADDED: lambda work: all(
        node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        for node in list_nodes(work.model.graph)
    ),
    Fact.FLAT: lambda work: all("Sequence" not in n.op_type for n in work.model.graph),
    Fact.REDUCED: lambda work: all(
        len(node.inputs) > 1 and node.inputs[1] is not None
        for node in work.model.graph
        if node.op_type.startswith("Reduce")
    ),
    Fact.FORMS: lambda work: len({id(m) for m in (work.model, *work.forms)}) == 3,
    Fact.WIDE: lambda work: all(
        v.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
        for form in work.forms
        for node in form.graph
        for v in node.outputs
    ),
    Fact.MODES: lambda work: (
        not list_random(work.inference.graph)
        and all(
            node.attributes.get_int("training_mode", 0) == 0
            for node in work.inference.graph
            if node.op_type == "BatchNormalization"
        )
    ),
    Fact.SEEDED: lambda work: not list_random(work.training.graph),
    Fact.OUTPUTS: lambda work: all(
        len(n.outputs) == 3 for n in work.training.graph if n.op_type == "LayerNormalization"
    ),
    Fact.ROLES: lambda work: work.roles.keys() == work.weights.keys(),
    Fact.SMOOTH: lambda work: not list_rough(work),
}
"""What can be seen of a model; the rest is known by what the passes do in their own tests."""


@pytest.mark.parametrize("name", ZOO)
def test_what_a_pass_ensures_holds_until_a_pass_spoils_it(name: str) -> None:
    work = Work(model=open_model(ZOO[name].build()))
    facts = Fact(0)
    for step in PASSES:
        step.run(work)
        facts = (facts & ~step.spoils) | step.ensures
        for fact in facts:
            assert fact not in CHECKS or CHECKS[fact](work), (step.work, fact)
    assert CHECKS.keys() <= set(facts)


def test_a_dropout_that_is_kept_leaves_a_key_among_the_inputs() -> None:
    work = Work(model=open_model(ZOO["dropout"].build()))
    for step in PASSES:
        step.run(work)
    assert KEY in {value.name for value in work.training.graph.inputs}


@pytest.mark.parametrize("index", range(len(PASSES)), ids=lambda index: PASSES[index].work)
def test_a_mistake_in_a_pass_is_told_of_that_pass(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(work: Any) -> None:
        work.no_such_attribute()

    step = PASSES[index]
    spoiled = [*PASSES[:index], replace(step, run=fail), *PASSES[index + 1 :]]
    monkeypatch.setattr(preparations, "PASSES", spoiled)
    with pytest.raises(InternalModelError, match="no_such_attribute") as caught:
        prepare(open_model(ZOO["chain"].build()))
    assert caught.value.work == step.work
