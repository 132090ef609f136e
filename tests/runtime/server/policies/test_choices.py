"""A policy is made by its name, and continues with the newest recorded round."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from onnx import helper

from splitonnx.bundles import PartyBundle
from splitonnx.errors import UsageError
from splitonnx.manifests import Phase
from splitonnx.names import SHARE, TRAIN
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.policies.choices import make_policy
from splitonnx.runtime.server.policies.joint_training import JointTraining
from splitonnx.runtime.server.policies.model_makers import ModelMaker
from splitonnx.runtime.server.policies.per_client import PerClient
from splitonnx.runtime.server.policies.policy_options import POLICIES, PolicyOptions
from splitonnx.runtime.server.policies.shared_training import SharedTraining
from splitonnx.runtime.storage.round_records import RoundRecord, RoundRecords
from splitonnx.tensors import TensorSpec
from tests.support import tiny
from tests.support.sharing import greet, share_task, sharing_bundle, source_of
from tests.support.zoo import FLOAT, Net

KINDS = {
    "per-client": PerClient,
    "sequential": JointTraining,
    "splitfed-v1": JointTraining,
    "splitfed-v2": SharedTraining,
    "synchronous": SharedTraining,
    "asynchronous": SharedTraining,
}


@pytest.mark.parametrize("name", POLICIES)
def test_each_name_gives_its_policy_which_asks_for_its_terms(name: str) -> None:
    bundle = sharing_bundle()
    options = PolicyOptions(name=name, local_steps=3)
    policy = make_policy(
        options, source_of(bundle), bundle.parties["server"].manifest, None, resume=False
    )
    assert (type(policy), policy.terms()) == (KINDS[name], options.terms)
    joined = policy.join(greet(bundle, "a" * 32), "ann", resume=False)
    assert joined.is_shared == (KINDS[name] is SharedTraining)
    assert joined.is_joint == (name == "synchronous")


def test_only_asynchronous_answers_a_share_alone_as_often_as_its_staleness_allows() -> None:
    bundle = sharing_bundle()
    options = PolicyOptions(name="asynchronous", clients_min=2, staleness=1)
    policy = make_policy(
        options, source_of(bundle), bundle.parties["server"].manifest, None, resume=False
    )
    for session in ("a" * 32, "b" * 32):
        policy.join(greet(bundle, session), "", resume=False)
        list(policy.submit(share_task(session, 0, 1.0)))
    answered = [len(list(policy.submit(share_task("a" * 32, n, 1.0, samples=1)))) for n in (1, 2)]
    assert answered == [1, 0]


@pytest.fixture(scope="module")
def recurrent() -> PartyBundle:
    """The server's part of a network that hands itself a state from step to step."""
    net = Net()
    projected = net.op("MatMul", "x", net.weight("w0", 2, 3), out="projected")
    kept = net.op("MatMul", "h_0", net.weight("wh", 3, 3), out="kept")
    state = net.op("Tanh", net.op("Add", projected, kept, out="sum"), out="h_n")
    net.op("MatMul", state, net.weight("w2", 3, 2), out="y")
    model = net.finish({"x": (FLOAT, (4, 2)), "h_0": (FLOAT, (4, 3))}, "y", 2)
    model.graph.output.append(helper.make_tensor_value_info("h_n", FLOAT, (4, 3)))
    bundle = cut(model, at="projected", output="y", states={"h_n": "h_0"})
    assert bundle.server is not None
    return bundle.server


@pytest.mark.parametrize("name", POLICIES)
def test_one_model_for_all_clients_keeps_no_client_s_state_for_another(
    name: str, recurrent: PartyBundle
) -> None:
    manifest, options = recurrent.manifest, PolicyOptions(name=name)
    source = ModelMaker(Executor(recurrent, Engine(threads=1)), None, None)
    if KINDS[name] is not SharedTraining:
        assert make_policy(options, source, manifest, None, resume=False)
        return
    with pytest.raises(UsageError, match=r"'h_0'.*one client's data would reach another"):
        make_policy(options, source, manifest, None, resume=False)


def test_a_bundle_whose_batches_cannot_be_joined_is_refused_for_joint_steps_alone() -> None:
    bundle = sharing_bundle()
    manifest = bundle.parties["server"].manifest
    fixed = tuple(fix_rows(phase) if phase.name == TRAIN else phase for phase in manifest.phases)
    manifest = msgspec.structs.replace(manifest, phases=fixed)
    with pytest.raises(UsageError, match="cannot be joined"):
        make_policy(
            PolicyOptions(name="synchronous"), source_of(bundle), manifest, None, resume=False
        )
    make_policy(PolicyOptions(name="splitfed-v2"), source_of(bundle), manifest, None, resume=False)


def fix_rows(phase: Phase) -> Phase:
    """Return the phase with 8 rows in each batch."""
    return msgspec.structs.replace(
        phase,
        wires=tuple(
            msgspec.structs.replace(
                wire,
                tensor=TensorSpec(
                    name=wire.tensor.name,
                    dtype=wire.tensor.dtype,
                    shape=tuple(8 if size == "N" else size for size in wire.tensor.shape),
                ),
            )
            for wire in phase.wires
        ),
    )


def test_a_bundle_that_declares_no_sharing_is_refused() -> None:
    server = tiny.split_bundle().parties["server"].manifest
    assert not server.phase(SHARE).wires
    with pytest.raises(UsageError, match="cut the model again with this version"):
        make_policy(
            PolicyOptions(name="splitfed-v1"), source_of(tiny.split_bundle()), server, None,
            resume=False,
        )  # fmt: skip


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", POLICIES[1:])
def test_only_a_server_that_resumes_continues_after_the_newest_round(
    tmp_path: Path, name: str, resume: bool
) -> None:
    bundle = sharing_bundle()
    bundle.save(tmp_path / "bundle")
    folder, manifest = tmp_path / "bundle" / "server", bundle.parties["server"].manifest
    tensors = {"W1@own": np.zeros((3, 4), np.float32), "W2": np.ones((4, 2), np.float32)}
    tensors["W2.m"] = tensors["W2"]
    RoundRecords(folder, manifest.digest).write(RoundRecord(number=7, tensors=tensors))
    policy = make_policy(
        PolicyOptions(name=name), source_of(bundle), manifest, folder, resume=resume
    )
    assert policy.report().closed == (7 if resume else 0)
    kept = RoundRecords(folder, manifest.digest).read_newest()
    assert (kept is not None) == resume  # a server that is killed early must not find it later


@pytest.mark.parametrize("name", ["splitfed-v2", "synchronous", "asynchronous"])
def test_one_model_continues_with_the_state_that_was_recorded(tmp_path: Path, name: str) -> None:
    bundle = sharing_bundle()
    bundle.save(tmp_path / "bundle")
    folder, manifest = tmp_path / "bundle" / "server", bundle.parties["server"].manifest
    tensors = {n: np.full((4, 2), 5.0, np.float32) for n in ("W2", "W2.m")}
    tensors["W1@own"] = np.zeros((3, 4), np.float32)
    record = RoundRecord(
        number=7,
        tensors=tensors,
        adoptions={"a" * 32: ((4, 7),)},
        owners={"a" * 32: "ann"},
        version=12,
    )
    RoundRecords(folder, manifest.digest).write(record)
    policy = make_policy(PolicyOptions(name=name), source_of(bundle), manifest, folder, resume=True)
    assert isinstance(policy, SharedTraining)
    assert policy.join(greet(bundle, "a" * 32), "ann", resume=True).step == 4
    model = policy.models["a" * 32]
    assert model.version == 12
    assert (model.executor.state()["W2"] == 5.0).all()


def test_the_record_of_a_policy_with_copies_is_refused_with_what_to_do(tmp_path: Path) -> None:
    bundle = sharing_bundle()
    bundle.save(tmp_path / "bundle")
    folder, manifest = tmp_path / "bundle" / "server", bundle.parties["server"].manifest
    tensors = {"W1@own": np.zeros((3, 4), np.float32), "W2": np.ones((4, 2), np.float32)}
    RoundRecords(folder, manifest.digest).write(RoundRecord(number=7, tensors=tensors))
    options = PolicyOptions(name="splitfed-v2")
    with pytest.raises(UsageError, match=r"without 'W2.m', by another policy"):
        make_policy(options, source_of(bundle), manifest, folder, resume=True)
    other = PolicyOptions(name="splitfed-v1")  # one of the two that it advises
    assert make_policy(other, source_of(bundle), manifest, folder, resume=True).report().closed == 7
    make_policy(options, source_of(bundle), manifest, folder, resume=False)
