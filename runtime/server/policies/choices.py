"""Choose a server's policy by its name, with the rules that its user gives."""

from __future__ import annotations

from pathlib import Path

from splitonnx.errors import UsageError
from splitonnx.manifests import PartyManifest
from splitonnx.names import PER_CLIENT, SEQUENTIAL, SHARE
from splitonnx.runtime.server.policies.joint_training import JointTraining
from splitonnx.runtime.server.policies.per_client import ModelSource, PerClient
from splitonnx.runtime.server.policies.policies import Policy
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.policies.relay import Relay
from splitonnx.runtime.server.policies.rounds import RoundRules, Rounds
from splitonnx.runtime.storage.round_records import RoundRecord, RoundRecords


def make_policy(
    options: PolicyOptions,
    source: ModelSource,
    manifest: PartyManifest,
    folder: Path | None,
    *,
    resume: bool,
) -> Policy:
    """Create the policy that the options name.

    ``source`` makes the models.  Closed rounds are recorded in the server's ``folder``, if it has
    one; with ``resume``, training continues after the newest of them, otherwise they are deleted.

    Raises:
        UsageError: the bundle does not declare how parameters are shared.
        BundleError: the records of an earlier training cannot be deleted.
    """
    copies = PerClient(source)
    if options.name == PER_CLIENT:
        return copies
    if not manifest.phase(SHARE).wires:
        raise UsageError(
            f"this bundle does not say how clients share parameters, which the policy "
            f"'{options.name}' needs; cut the model again with this version"
        )
    records = None if folder is None else RoundRecords(folder, manifest.digest)
    rules = RoundRules(
        clients_min=options.clients_min,
        quorum=options.quorum,
        timeout=options.round_timeout,
    )
    coordinator = Relay if options.name == SEQUENTIAL else Rounds
    return JointTraining(
        copies,
        coordinator(rules, _open(records, resume=resume)),
        terms=options.terms,
        manifest=manifest,
        record=_forget if records is None else records.write,
    )


def _open(records: RoundRecords | None, *, resume: bool) -> RoundRecord | None:
    """Return the newest recorded round; a training that begins deletes those of earlier ones."""
    if records is None:
        return None
    if not resume:
        records.clear()
        return None
    return records.read_newest()


def _forget(record: RoundRecord) -> None:
    """Record nothing, because there is no folder."""
