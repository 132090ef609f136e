"""A client's greeting, and the check of the server's answer to it.

The server is not trusted: its answer may only name a step whose state the client has kept, and ask
the client to share its parameters only if the client's user permits it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from splitonnx.errors import RemoteProtocolError, SharingNotPermitted
from splitonnx.manifests import PartyManifest
from splitonnx.messages import Hello, Welcome
from splitonnx.names import PER_CLIENT, SHARE
from splitonnx.runtime.wire.protocols import list_wires


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """The steps from which a client can resume; see :class:`~splitonnx.messages.Hello`."""

    origin: str
    start: int
    step: int
    kept: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SharingTerms:
    """How the server joins what its clients learn.

    If ``local_steps`` is not 0, the client shares its parameters after this many steps, until
    ``rounds`` rounds are complete; 0 means that the client decides.  ``policy`` is a name that is
    only shown.  ``can_accumulate`` means that a step may consist of several micro-batches.
    """

    policy: str = PER_CLIENT
    local_steps: int = 0
    rounds: int = 0
    can_accumulate: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        if not self.joins:
            return f"'{self.policy}'"
        return f"'{self.policy}' with {self.local_steps} local steps and {self.rounds} rounds"

    @property
    def joins(self) -> bool:
        """Return whether the client has to share its parameters."""
        return self.local_steps > 0


def list_change(before: SharingTerms | None, now: SharingTerms) -> tuple[str, str, str, str]:
    """Return what :class:`BundleMismatch` tells of a server that came back with other terms."""
    advice = "serve with the options of before, or resume this training with --resume"
    return "how clients are joined", str(before), str(now), advice


def make_hello(
    manifest: PartyManifest,
    session: str,
    point: ResumePoint,
    *,
    generation: int,
    is_open: bool,
    can_repeat: bool,
    can_share: bool,
    micro_batch: int = 0,
    in_flight: int = 1,
) -> Hello:
    """Make the greeting of a client that can resume from ``point``; see :class:`Hello`."""
    return Hello(
        digest=manifest.digest,
        session=session,
        origin=point.origin,
        start=point.start,
        generation=generation,
        step=point.step,
        kept=point.kept,
        is_open=is_open,
        can_repeat=can_repeat,
        can_share=can_share,
        micro_batch=micro_batch,
        in_flight=in_flight,
        wires=list_wires(manifest),
    )


def check_welcome(
    welcome: Welcome,
    session: str,
    point: ResumePoint,
    *,
    manifest: PartyManifest,
    can_share: bool,
) -> SharingTerms:
    """Check the server's answer to a greeting, and return how it joins what clients learn.

    Raises:
        RemoteProtocolError: it names another session, or a step whose state was not kept, or asks
            for parameters although the bundle does not declare how they are shared.
        SharingNotPermitted: it asks for parameters, and the user does not permit to share them.
    """
    if welcome.session != session:
        raise RemoteProtocolError(f"it welcomed session '{welcome.session[:40]}'")
    if welcome.step not in (point.step, *(point.kept or (point.start,))):
        raise RemoteProtocolError(
            f"it would continue at step {welcome.step}, but no state of that step was kept"
        )
    if welcome.local_steps and not can_share:
        raise SharingNotPermitted(welcome.policy[:40])
    if welcome.local_steps and not manifest.phase(SHARE).wires:
        raise RemoteProtocolError("it asks for parameters, which this bundle does not share")
    return SharingTerms(
        policy=welcome.policy[:40],
        local_steps=welcome.local_steps,
        rounds=welcome.rounds,
        can_accumulate=welcome.can_accumulate,
    )
