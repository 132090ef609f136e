"""``check``: what it says of a model is what cutting and training it then do."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import helper

from splitonnx.errors import NotAModel, NotDifferentiable, UnsupportedModel, UsageError
from splitonnx.losses import Loss
from splitonnx.optimizers import SGD, ParameterGroup
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import Handling, check
from splitonnx.partitioner.reports.inspections import inspect
from splitonnx.partitioner.reports.remarks import Kind
from tests.end_to_end.test_bad_input import build_conditional
from tests.support.zoo import FLOAT, ZOO, Net

UNTRAINED = Kind.WITHOUT_GRADIENT


def build_with(kind: str, **attributes: object) -> onnx.ModelProto:
    """Put one operator between two layers."""
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w1", 6, 8), out="m1")
    hidden = net.op(kind, hidden, out="inner", **attributes)
    output = net.op("MatMul", hidden, net.weight("w2", 8, 3), out="scores")
    return net.finish({"x": (FLOAT, ["N", 6])}, output, 3)


@pytest.mark.parametrize("name", ZOO)
def test_every_model_of_the_zoo_can_be_trained(name: str) -> None:
    found = check(ZOO[name].build())
    assert found.trainable, found.obstacles
    assert ZOO[name].loss in found.losses
    assert len(found.cuts) == len(inspect(ZOO[name].build()))


def test_parameters_are_counted_as_they_would_be_cut() -> None:
    found = check(ZOO["dropout"].build())
    client = cut(ZOO["dropout"].build(), at=None).client
    sizes = dict.fromkeys(("parameter", "frozen", "buffer"), 0)
    for spec in client.manifest.state:
        if spec.role in sizes:
            sizes[spec.role] += client.weights[spec.tensor.name].size
    assert (found.parameters, found.frozen, found.statistics) == tuple(sizes.values())


def build_two_heads() -> onnx.ModelProto:
    """Build a shared layer and two outputs, each behind a normalization and a layer of its own."""
    net = Net()
    shared = net.op("Tanh", net.op("MatMul", "x", net.weight("w", 6, 8), out="mixed"), out="shared")
    for name, width in (("a", 3), ("b", 2)):
        norm = net.batchnorm(shared, 8, out=f"{name}_n", training=True)
        net.op("MatMul", norm, net.weight(f"{name}.w", 8, width), out=name)
    model = net.finish({"x": (FLOAT, ["N", 6])}, "a", 3)
    model.graph.output.append(helper.make_tensor_value_info("b", FLOAT, ["N", 2]))
    return model


def build_untrained() -> dict[str, tuple[onnx.ModelProto, str, set[str]]]:
    """Build models with an output, and the weights that a loss of this output does not change."""
    chosen = Net()
    chosen.op("MatMul", "x", chosen.weight("w", 6, 8), out="mixed")
    place = chosen.op("ArgMax", "mixed", axis=1, keepdims=0, out="place")
    chosen.op("Gather", chosen.weight("rows", 8, 3), place, out="y")
    other = {f"b_n.bn.{part}" for part in ("scale", "bias", "mean", "var")} | {"b.w"}
    return {
        "step": (build_with("Floor"), "scores", {"w1"}),
        "choice": (chosen.finish({"x": (FLOAT, ["N", 6])}, "y", 3), "y", {"w"}),
        "head": (build_two_heads(), "a", other),
        "second head": (build_two_heads(), "b", {name.replace("b", "a", 1) for name in other}),
    }


@pytest.mark.parametrize("name", build_untrained())
def test_what_gets_no_gradient_is_counted_as_frozen_as_in_a_cut(name: str) -> None:
    model, output, _ = build_untrained()[name]
    found = check(model, output=output)
    client = cut(model, at=None, output=output, loss="mse").client
    sizes = dict.fromkeys(("parameter", "frozen", "buffer"), 0)
    for spec in client.manifest.state:
        if spec.role in sizes:
            sizes[spec.role] += client.weights[spec.tensor.name].size
    assert (found.parameters, found.frozen, found.statistics) == tuple(sizes.values())
    assert found.untrained == found.frozen > 0


@pytest.mark.parametrize("name", build_untrained())
def test_what_gets_no_gradient_is_named_with_the_reason(name: str) -> None:
    model, output, untrained = build_untrained()[name]
    remarks = [each for each in check(model, output=output).remarks if each.kind == UNTRAINED]
    assert {weight for remark in remarks for weight in remark.names} == untrained
    reason = {"step": "(Floor)", "choice": "(ArgMax)"}.get(name, f"'{output}' does not depend on")
    assert all(reason in remark.sentence for remark in remarks)


def test_nothing_is_said_where_every_parameter_gets_a_gradient() -> None:
    found = check(build_with("Tanh"))
    assert found.untrained == 0
    assert all(remark.kind != UNTRAINED for remark in found.remarks)


def test_operators_are_told_apart_by_what_becomes_of_them() -> None:
    uses = {use.operator: use for use in check(build_with("Floor")).operators}
    assert uses["MatMul"].handling is Handling.NATIVE
    assert uses["MatMul"].nodes == 2
    assert uses["Floor"].handling is Handling.REWRITTEN


def test_operators_before_every_parameter_run_forward_only() -> None:
    net = Net()
    scaled = net.op("Exp", "x", out="scaled")
    output = net.op("MatMul", scaled, net.weight("w", 6, 3), out="scores")
    model = net.finish({"x": (FLOAT, ["N", 6])}, output, 3)
    uses = {use.operator: use.handling for use in check(model).operators}
    assert uses == {"Exp": Handling.FORWARD, "MatMul": Handling.NATIVE}


def test_what_stands_in_the_way_is_named_as_cut_would_name_it() -> None:
    model = build_conditional(trained=True)
    found = check(model)
    assert not found.trainable
    with pytest.raises(NotDifferentiable) as caught:
        cut(model, at=None)
    assert found.obstacles == (str(caught.value),)
    assert Handling.OBSTACLE in {use.handling for use in found.operators if use.operator == "If"}


def test_a_loss_that_does_not_fit_is_said_with_the_reason() -> None:
    model = ZOO["residual"].build()
    found = check(model, loss="from-model")
    assert not found.trainable
    assert "a loss is a float32 scalar" in found.obstacles[0]
    assert "from-model" not in check(model).losses


LOSSES = [Loss(kind="mse", output="a", labels="one"), Loss(output="b", labels="two")]


def test_several_losses_are_tried_together_as_cut_takes_them() -> None:
    model = build_two_heads()
    found = check(model, loss=LOSSES)
    assert found.trainable
    assert (found.output, found.outputs) == ("a", ("a", "b"))
    assert found.losses == ("mse", "cross-entropy")
    client = cut(model, at=None, loss=LOSSES).client
    trained = [s.tensor.name for s in client.manifest.state if s.role == "parameter"]
    assert found.parameters == sum(client.weights[name].size for name in trained)
    assert found.untrained == 0
    assert [one.tensor for one in found.cuts] == ["mixed", "shared"]
    for one in found.cuts:
        cut(model, at=one.tensor, loss=LOSSES)
    assert check(model, loss=LOSSES[0]).untrained > 0
    assert check(model, loss=LOSSES[1]).outputs == ("b",)


def test_one_of_several_losses_that_does_not_fit_is_said_as_cut_says_it() -> None:
    model = build_two_heads()
    losses = [LOSSES[0], Loss(kind="from-model", output="b")]
    found = check(model, loss=losses)
    assert not found.trainable
    assert found.losses == ("mse",)
    with pytest.raises(UnsupportedModel) as caught:
        cut(model, at=None, loss=losses)
    assert found.obstacles == (str(caught.value),)


def test_a_loss_of_ones_own_is_tried(tmp_path: Path) -> None:
    own = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 18]>
        own (float[N, 3] a, float[N, 3] wanted) => (float loss)
        { gap = Sub (a, wanted)  loss = ReduceSumSquare <keepdims = 0> (gap) }"""
    )
    file = tmp_path / "own.onnx"
    onnx.save(own, file)
    found = check(build_two_heads(), loss=str(file))
    assert found.trainable
    assert (found.outputs, found.losses) == (("a",), ("from-file",))


def test_settings_that_a_loss_does_not_have_are_refused_as_cut_refuses_them() -> None:
    with pytest.raises(UsageError, match="--label-smoothing is for cross-entropy"):
        check(build_two_heads(), loss=Loss(kind="mse", label_smoothing=0.1))
    with pytest.raises(UsageError, match="there is no loss; name one"):
        check(build_two_heads(), loss=[])


def test_a_group_without_a_parameter_is_told_of_those_that_the_output_trains() -> None:
    model, groups = build_two_heads(), [ParameterGroup(pattern="tail", lr_factor=2)]
    told = "those are 'w', 'a_n.bn.scale', 'a_n.bn.bias', 'a.w'$"
    with pytest.raises(UsageError, match=told):
        cut(model, at=None, output="a", optimizer=SGD(groups=groups))
    with pytest.raises(UsageError, match=told):
        check(model, output="a", groups=groups)
    with pytest.raises(UsageError, match=r", 'b\.w'$"):
        cut(model, at=None, loss=LOSSES, optimizer=SGD(groups=groups))


def test_slips_are_errors() -> None:
    model = ZOO["chain"].build()
    with pytest.raises(UsageError, match="there is no loss 'hinge'"):
        check(model, loss="hinge")
    with pytest.raises(UsageError, match="the model has no output 'nowhere'"):
        check(model, output="nowhere")
    with pytest.raises(NotAModel):
        check(b"no model")
