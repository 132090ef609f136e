"""Choose a server's policy by its name, with the rules that its user gives."""

from __future__ import annotations

from pathlib import Path

from splitonnx.errors import UsageError
from splitonnx.manifests import PartyManifest
from splitonnx.names import (
    ASYNCHRONOUS,
    ONE_MODEL,
    PER_CLIENT,
    SEQUENTIAL,
    SHARE,
    SPLITFED_V1,
    SYNCHRONOUS,
)
from splitonnx.runtime.server.policies.joining.asynchronous import Asynchronous
from splitonnx.runtime.server.policies.joining.relay import Relay
from splitonnx.runtime.server.policies.joining.rounds import RoundRules, Rounds
from splitonnx.runtime.server.policies.joint_training import JointTraining
from splitonnx.runtime.server.policies.per_client import PerClient
from splitonnx.runtime.server.policies.policies import Policy
from splitonnx.runtime.server.policies.policy_options import PolicyOptions
from splitonnx.runtime.server.policies.shared_training import SharedSource, SharedTraining
from splitonnx.runtime.server.policies.steps.joint_batches import BatchLayout
from splitonnx.runtime.server.policies.steps.shared_steps import SharedSteps
from splitonnx.runtime.storage.round_records import RoundRecord, RoundRecords
from splitonnx.sharing import list_carried


def make_policy(
    options: PolicyOptions,
    source: SharedSource,
    manifest: PartyManifest,
    folder: Path | None,
    *,
    resume: bool,
) -> Policy:
    """Create the policy that the options name.

    ``source`` makes the models.  Closed rounds are recorded in the server's ``folder``, if it has
    one; with ``resume``, training continues after the newest of them, otherwise they are deleted.

    Raises:
        UsageError: the bundle does not declare how parameters are shared, its tensors cannot be
            joined to one batch, or one model for all clients would hold a client's data.
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
    if options.name in ONE_MODEL:
        _check_carried(options.name, manifest)
    records = None if folder is None else RoundRecords(folder, manifest.digest)
    layout = BatchLayout(manifest) if options.name == SYNCHRONOUS else None
    rounds = _make_rounds(options, _open(records, resume=resume))
    record = _forget if records is None else records.write
    if options.name not in ONE_MODEL:
        return JointTraining(copies, rounds, terms=options.terms, manifest=manifest, record=record)
    steps = SharedSteps(layout=layout, quorum=options.quorum, timeout=options.round_timeout)
    return SharedTraining(
        source,
        rounds,
        steps,
        terms=options.terms,
        manifest=manifest,
        record=record,
        read_before=None if records is None else records.read_before,
    )


def _check_carried(policy: str, manifest: PartyManifest) -> None:
    """Refuse a model that hands itself a state, which would pass from one client to another."""
    if carried := list_carried(manifest):
        raise UsageError(
            f"the server's part hands '{carried[0]}' from step to step (--state, +ef), and with "
            f"the policy '{policy}' one client's data would reach another in it, as all train one "
            f"model; take '{SPLITFED_V1}' or '{SEQUENTIAL}', where each client has a copy of it"
        )


def _make_rounds(options: PolicyOptions, newest: RoundRecord | None) -> Rounds:
    """Create the rounds that the options name, which continue after the round ``newest``."""
    rules = RoundRules(
        clients_min=options.clients_min,
        quorum=options.quorum,
        timeout=options.round_timeout,
    )
    if options.name == ASYNCHRONOUS:
        return Asynchronous(rules, newest, staleness=options.staleness)
    return Relay(rules, newest) if options.name == SEQUENTIAL else Rounds(rules, newest)


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
