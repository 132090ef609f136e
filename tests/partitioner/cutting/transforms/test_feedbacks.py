"""Error feedback, against the same steps with the residual kept in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import splitonnx
from splitonnx.bundles import Bundle
from splitonnx.errors import UsageError
from splitonnx.manifests import Role
from splitonnx.messages import TaskKey
from splitonnx.names import SERVER, TRAIN
from splitonnx.optimizers import SGD
from splitonnx.partitioner.cutting.transforms.crossings import encode_crossings
from splitonnx.partitioner.cutting.transforms.feedbacks import declare_residual, make_residual
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.policies.choices import make_policy
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.tensors import TensorSpec
from splitonnx.torch import loads
from splitonnx.wire_codecs import read_wire
from tests.support.links import link
from tests.support.zoo import ZOO

ROWS = 8
WIRE = "bwd=topk=0.3+ef"
NAME = "act1@server_grad#residual"


def make_plain(tail_at: str = "") -> Bundle:
    return cut(
        ZOO["chain"].build(),
        at="act1",
        tail_at=tail_at or (),
        optimizer=SGD(lr=0.1),
        dims={"N": ROWS},
    )


def encode(wire: str = WIRE) -> Bundle:
    return encode_crossings(make_plain(), read_wire(wire))


def keep_largest(x: np.ndarray, count: int = 3) -> np.ndarray:
    kept = np.argsort(-np.abs(x), axis=1)[:, :count]
    made = np.zeros_like(x)
    np.put_along_axis(made, kept, np.take_along_axis(x, kept, 1), 1)
    return made


class Steps:
    """Steps of the parts without a codec, with the gradient changed on its way in numpy."""

    def __init__(self) -> None:
        self.parties = [Executor(p, Engine(threads=1)) for p in make_plain().parties.values()]
        self.residual = np.zeros((ROWS, 7), np.float32)

    def take(self, number: int) -> float:
        client, server = self.parties
        key, data = TaskKey("s", TRAIN, number, 0), ZOO["chain"].data(ROWS, seed=number)
        client.begin(key, data=data, seed=0, learning_rate=0.1)
        server.begin(key, data={}, seed=0, learning_rate=0.1)
        (sent,) = client.advance(key)
        server.deliver(key, sent)
        reply = {name: array for group in server.advance(key) for name, array in group.items()}
        summed = reply["act1@server_grad"] + self.residual
        reply["act1@server_grad"] = keep_largest(summed)
        self.residual = summed - reply["act1@server_grad"]
        client.deliver(key, reply)
        list(client.advance(key))
        server.finish(key)
        return float(client.finish(key)["loss"])


def test_what_was_left_out_of_a_gradient_is_added_to_the_next() -> None:
    bundle, wanted = encode(), Steps()
    client, _ = link(bundle)
    for number in range(4):
        data = ZOO["chain"].data(ROWS, seed=number)
        found = float(client.step(data, learning_rate=0.1)["loss"])
        assert found == pytest.approx(wanted.take(number), rel=1e-5)
    for name, array in client.state().items():
        np.testing.assert_allclose(array, wanted.parties[0].state()[name], rtol=1e-4, atol=1e-6)
    assert wanted.residual.any()


def test_the_residual_is_a_state_of_the_sender_that_starts_at_zeros() -> None:
    bundle = encode()
    assert bundle.server is not None
    (spec,) = [s for s in bundle.server.manifest.state if s.tensor.name == NAME]
    assert (spec.role, spec.tensor.shape) == (Role.BUFFER, (ROWS, 7))
    assert not bundle.server.weights[NAME].any()
    assert bundle.server.manifest.phase(TRAIN).commits[NAME] == f"{NAME}/next"
    assert NAME not in bundle.client.weights
    tensor = TensorSpec(name="g", dtype="F32", shape=(3, 4))
    assert declare_residual(tensor).tensor.shape == make_residual(tensor).shape == (3, 4)


def test_training_goes_on_from_a_saved_residual(tmp_path: Path) -> None:
    encode().save(tmp_path / "bundle")
    losses = []
    for is_interrupted in (False, True):
        server = Executor(Bundle.load(tmp_path / "bundle").parties[SERVER], Engine(threads=1))
        residuals = []
        key = [TaskKey("s", TRAIN, number, 0) for number in range(3)]
        for number in range(3):
            if is_interrupted and number == 2:
                state = server.state()
                server = Executor(
                    Bundle.load(tmp_path / "bundle").parties[SERVER], Engine(threads=1)
                )
                server.restore(state, 2)
            server.begin(key[number], data={}, seed=0, learning_rate=0.1)
            rows = np.random.default_rng(number).standard_normal((ROWS, 7), np.float32)
            labels = np.arange(ROWS) % 4
            server.deliver(key[number], {"act1@server": rows, "labels@server": labels})
            list(server.advance(key[number]))
            server.finish(key[number])
            residuals.append(server.state()[NAME])
        losses.append(residuals)
    for one, other in zip(*losses, strict=True):
        np.testing.assert_array_equal(one, other)
    assert (losses[0][1] != losses[0][2]).any()


def test_the_merged_model_knows_no_residual() -> None:
    assert merge(encode()) == merge(make_plain())


def test_a_residual_is_no_weight_of_a_network() -> None:
    bundle = encode_crossings(make_plain(tail_at="act3"), read_wire(WIRE))
    weights, _ = loads._read(bundle)
    assert not [name for name in weights.arrays if "#" in name]
    assert [name for name in bundle.client.weights if "#" in name] == ["act3@client_grad#residual"]


def test_explain_follows_a_residual_of_the_client_to_the_next_step() -> None:
    bundle = encode_crossings(make_plain(tail_at="act3"), read_wire(WIRE))
    found = splitonnx.explain(bundle.client)
    (train,) = [p for p in found.phases if p.leaves.phase == TRAIN]
    (labels,) = [a for a in train.arrays if a.name == "labels"]
    assert [way.tensor.tensor for way in labels.ways] == ["act3"]


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        ("topk=0.3+ef", "error feedback (+ef) is for gradients"),
        ("fwd=int8+ef", "leave it out of fwd"),
    ],
)
def test_activations_have_no_feedback(wire: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        encode(wire)
    assert reason in str(caught.value)


def test_a_free_batch_is_refused_with_the_option_that_fixes_it() -> None:
    plain = cut(ZOO["chain"].build(), at="act1")
    with pytest.raises(UsageError, match=r"its size 'N' is not known beforehand.* --dim N=32"):
        encode_crossings(plain, read_wire(WIRE))


def test_one_model_for_all_clients_would_mix_their_residuals() -> None:
    bundle = encode()
    assert bundle.server is not None
    options = PolicyOptions(name="splitfed-v2", local_steps=1)
    with pytest.raises(UsageError, match=r"hands 'act1@server_grad#residual' from step to step"):
        make_policy(options, None, bundle.server.manifest, None, resume=False)  # type: ignore[arg-type]
