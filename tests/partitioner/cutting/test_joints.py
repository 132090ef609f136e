"""Joint graphs: what crosses in them, who computes what, and what the client gets."""

from __future__ import annotations

import pytest

from splitonnx.errors import UsageError
from splitonnx.losses import Loss
from splitonnx.manifests import WireKind
from splitonnx.partitioner.cutting.joints import (
    JointGraph,
    build_predict,
    build_training,
)
from splitonnx.partitioner.cutting.preparations import PreparedModel, prepare
from splitonnx.partitioner.gate.gates import open_model
from tests.support.zoo import FLOAT, ZOO, Net


def prepare_entry(name: str, **settings: object) -> PreparedModel:
    return prepare(open_model(ZOO[name].build()), **settings)  # type: ignore[arg-type]


def join(name: str, at: tuple[str, ...], tail_at: tuple[str, ...] = ()) -> JointGraph:
    prepared = prepare_entry(name)
    output = prepared.inference.graph.outputs[0].name or ""
    return build_training(prepared, at, tail_at, [Loss(kind=ZOO[name].loss, output=output)])


def list_wires(joint: JointGraph) -> dict[str, tuple[str, str, WireKind]]:
    return {w.tensor.name: (w.crossing.sender, w.crossing.receiver, w.kind) for w in joint.wires}


def test_a_vanilla_cut_sends_activation_and_labels_up_and_the_rest_down() -> None:
    joint = join("chain", ("act1",))
    assert list_wires(joint) == {
        "act1@server": ("client", "server", WireKind.ACTIVATION),
        "labels@server": ("client", "server", WireKind.INPUT),
        "act1@server_grad": ("server", "client", WireKind.GRADIENT),
        "loss": ("server", "client", WireKind.REPORT),
        **dict.fromkeys(joint.results, ("server", "client", WireKind.REPORT)),
    }
    assert "loss" in joint.results


def test_a_gradient_is_declared_as_what_it_is_the_gradient_of() -> None:
    specs = {wire.tensor.name: wire.tensor for wire in join("chain", ("act1",)).wires}
    up, down = specs["act1@server"], specs["act1@server_grad"]
    assert (down.dtype, down.shape) == (up.dtype, up.shape)


def test_labels_that_cross_keep_their_bounds() -> None:
    joint = join("chain", ("act1",))
    (labels,) = [w.tensor for w in joint.wires if w.tensor.name == "labels@server"]
    assert labels.bounds is not None
    assert labels.bounds == joint.data["labels"].bounds


def test_a_u_shaped_cut_keeps_labels_and_loss_at_home() -> None:
    joint = join("chain", ("act0",), ("act1",))
    wires = list_wires(joint)
    assert set(wires) == {"act0@server", "act1@client", "act1@client_grad", "act0@server_grad"}
    assert wires["act1@client_grad"][:2] == ("client", "server")
    assert {value.name for value in joint.targets["client"]} >= set(joint.results)


@pytest.mark.parametrize("is_first", [False, True])
def test_an_identity_of_the_model_is_not_mistaken_for_a_port(is_first: bool) -> None:
    net = Net()
    hidden = net.op("Tanh", net.op("MatMul", "x", net.weight("w1", 6, 5), out="h"), out="a")
    if is_first:
        net.op("Identity", hidden, out="skip")
    body = net.op("MatMul", hidden, net.weight("w2", 5, 5), out="b")
    if not is_first:
        net.op("Identity", hidden, out="skip")
    joined = net.op("Add", body, net.op("Tanh", "skip", out="t"), out="sum")
    net.op("MatMul", joined, net.weight("w3", 5, 3), out="y")
    prepared = prepare(open_model(net.finish({"x": (FLOAT, ["N", 6])}, "y", 3)))
    joint = build_training(prepared, ["a"], ["b"], [Loss(output="y")])
    assert list_wires(joint).keys() == {"a@server", "b@client", "a@server_grad", "b@client_grad"}
    readers = {v.name: {u.node.op_type for u in v.uses()} for n in joint.graph for v in n.outputs}
    assert "Tanh" not in readers["a@server"]  # the skip stays with the client
    assert not any(node.attributes for node in joint.graph if node.op_type == "Identity")


def test_every_weight_is_his_whose_forward_part_uses_it() -> None:
    joint = join("chain", ("act1",))
    owners = {name: set(parties) for name, parties in joint.owners.items()}
    assert owners["w0"] == owners["b1"] == {"client"}
    assert owners["w2"] == owners["b4"] == {"server"}
    assert set(joint.gradients) == set(owners)
    made = {value.name for value in joint.targets["server"]}
    assert {joint.gradients["w2"], joint.gradients["b4"]} <= made
    assert joint.gradients["w0"] not in made


def test_without_a_cut_the_client_computes_all_and_nothing_crosses() -> None:
    joint = join("chain", ())
    assert joint.wires == ()
    assert set(joint.targets) == {"client"}


def test_the_first_part_of_frozen_weights_gets_no_gradient() -> None:
    prepared = prepare_entry("chain", freeze=["^[wb][01]$"])
    output = prepared.inference.graph.outputs[0].name or ""
    joint = build_training(prepared, ("act1",), (), [Loss(output=output)])
    assert "act1@server_grad" not in list_wires(joint)
    assert not {"w0", "b1"} & joint.gradients.keys()


def test_running_statistics_are_replaced_after_a_step() -> None:
    joint = join("batchnorm_trained", ("r1",))
    assert set(joint.commits) == {f"{n}.bn.{s}" for n in ("n1", "n2") for s in ("mean", "var")}
    made = {value.name for value in joint.targets["client"]}
    assert joint.commits["n1.bn.mean"] in made
    assert joint.commits["n2.bn.mean"] not in made


def test_nothing_to_train_is_said() -> None:
    prepared = prepare_entry("chain", freeze=["."])
    output = prepared.inference.graph.outputs[0].name or ""
    with pytest.raises(UsageError, match="nothing is left to train"):
        build_training(prepared, ("act1",), (), [Loss(output=output)])


def test_a_prediction_sends_the_activation_up_and_the_output_down() -> None:
    prepared = prepare_entry("chain")
    (output,) = [value.name or "" for value in prepared.inference.graph.outputs]
    joint = build_predict(prepared, ("act1",), ())
    assert list_wires(joint) == {
        "act1@server": ("client", "server", WireKind.ACTIVATION),
        output: ("server", "client", WireKind.OUTPUT),
    }
    assert joint.results == (output,)
    assert set(joint.data) == {"x"}
    assert joint.gradients == joint.commits == {}
    at_home = build_predict(prepared, ("act0",), ("act1",))
    assert output not in list_wires(at_home)
