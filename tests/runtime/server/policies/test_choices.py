"""A policy is made by its name, and continues with the newest recorded round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from splitonnx.errors import UsageError
from splitonnx.names import SHARE
from splitonnx.runtime.server.policies.choices import make_policy
from splitonnx.runtime.server.policies.joint_training import JointTraining
from splitonnx.runtime.server.policies.per_client import PerClient
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.storage.round_records import RoundRecord, RoundRecords
from tests.support import tiny
from tests.support.sharing import sharing_bundle, source_of


def test_each_policy_asks_for_its_terms() -> None:
    bundle = sharing_bundle()
    for name, kind in (("per-client", PerClient), ("splitfed-v1", JointTraining)):
        options = PolicyOptions(name=name, local_steps=3)
        policy = make_policy(options, source_of(bundle), bundle.parties["server"].manifest, None,
                             resume=False)  # fmt: skip
        assert (type(policy), policy.terms()) == (kind, options.terms)


def test_a_bundle_that_declares_no_sharing_is_refused() -> None:
    server = tiny.split_bundle().parties["server"].manifest
    assert not server.phase(SHARE).wires
    with pytest.raises(UsageError, match="cut the model again with this version"):
        make_policy(
            PolicyOptions(name="splitfed-v1"), source_of(tiny.split_bundle()), server, None,
            resume=False,
        )  # fmt: skip


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["sequential", "splitfed-v1"])
def test_only_a_server_that_resumes_continues_after_the_newest_round(
    tmp_path: Path, name: str, resume: bool
) -> None:
    bundle = sharing_bundle()
    bundle.save(tmp_path / "bundle")
    folder, manifest = tmp_path / "bundle" / "server", bundle.parties["server"].manifest
    tensors = {"W1@own": np.zeros((3, 4), np.float32), "W2": np.ones((4, 2), np.float32)}
    RoundRecords(folder, manifest.digest).write(RoundRecord(number=7, tensors=tensors))
    policy = make_policy(
        PolicyOptions(name=name), source_of(bundle), manifest, folder, resume=resume
    )
    assert policy.report().closed == (7 if resume else 0)
    kept = RoundRecords(folder, manifest.digest).read_newest()
    assert (kept is not None) == resume  # a server that is killed early must not find it later
