"""Complete a bundle, whose client was trained elsewhere, with the server's part from a server.

The client's folder says which session trained it, and to which step.  What the server sends has to
be of the same bundle, session and step, and to have the tensors that the bundle declares.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from splitonnx.bundles import MODEL, WEIGHTS, Bundle, PartyBundle
from splitonnx.errors import (
    BundleError,
    BundleMismatch,
    FormatError,
    StateNotFetched,
    StateNotFinite,
    UnwritableFile,
    UsageError,
    list_some,
)
from splitonnx.manifests import StateSpec
from splitonnx.names import CLIENT, SERVER
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.queries.http_queries import name_peer
from splitonnx.runtime.channels.queries.state_downloads import describe_state, download_state
from splitonnx.runtime.wire.saved_states import SavedState
from splitonnx.states import (
    STATE,
    State,
    check_finite_state,
    decode_outcome,
    is_session,
    list_outcomes,
    read_newest,
)
from splitonnx.tensors import DTYPES

_MOST_FACTS = 1 << 16
"""Bytes of a state's file for what is not about a tensor."""
_MOST_ENTRY = 256
"""Bytes of a tensor's entry in the header, without its name."""


def collect(
    source: Bundle | str | Path,
    url: str,
    *,
    credentials: Credentials | None = None,
    session: str = "",
    folder: str | Path | None = None,
) -> Bundle:
    """Return a bundle with the server's part as the server at ``url`` has saved it.

    :func:`splitonnx.merge` makes one model of it.  The server has to know the token of
    ``credentials``, whose owner trained the session, and which has the role ``fetch``.

    Args:
        source: the bundle, with the client's part as it was trained; or its folder, or the client's
            folder in it.
        url: the server's address, such as ``ws://127.0.0.1:8765``.
        credentials: the token, and the servers that are trusted.
        session: the session to fetch, of those whose outcome the client's folder has, or the
            beginning of its name; by default the one that was trained last.
        folder: where the state is kept, in a file without a name, as long as it is used; by default
            the system's folder for temporary files.

    Raises:
        UsageError: there is no server's part, no trained client's part, or no such session.
        BundleError, FormatError: the folder cannot be used.
        BundleMismatch: the server has another bundle, or is at another step.
        StateNotFetched: the server has no such state, or what it sends cannot be used.
        ProtocolError: see :func:`~http_queries.ask`.
        UnwritableFile: the state cannot be kept in ``folder``.
    """
    bundle = source if isinstance(source, Bundle) else _open(Path(source), session)
    client, server = bundle.client, bundle.server
    if server is None:
        raise UsageError("the bundle has no server's part; merge it without --from")
    if client.trained is None or not is_session(client.session):
        raise UsageError(
            "the client's folder has no finished training with a server; train to the end with a "
            "token that may publish, or put the trained client's folder in its place"
        )
    if not client.session.startswith(session):
        raise UsageError(f"the client's part is of session {client.session}, not {session}")
    credentials = credentials or Credentials()
    found = describe_state(url, credentials, client.session)
    _check_belonging(found, bundle, server)
    most = _measure(server.manifest.state)
    try:
        content = _download(url, credentials, found, most, folder)
    except OSError as error:
        place = tempfile.gettempdir() if folder is None else folder
        raise UnwritableFile(str(place), error.strerror or str(error)) from error
    state = _decode(content, server, found, name_peer(url))
    return _replace_server(bundle, server.with_state(state))


def _open(path: Path, session: str) -> Bundle:
    """Read a bundle from its folder, or from the client's folder in it."""
    if (path / WEIGHTS).is_file() and not (path / MODEL).exists():
        home = path.resolve().parent
        if path.resolve().name != CLIENT or not (home / MODEL).is_file():
            raise UsageError(
                f"{path} is a party's folder, and the model to merge into is missing; put it as "
                f"'{CLIENT}' into the folder that `splitonnx cut` wrote, which has {MODEL}, and "
                "name that folder"
            )
        path = home
    try:
        bundle = Bundle.load(path)
    except BundleError as error:
        if (path / MODEL).is_file() and not (path / SERVER).exists():
            raise UsageError(
                f"{path} has no folder '{SERVER}'; put the server's folder back as `splitonnx cut` "
                "wrote it, since what a server sends is checked against it"
            ) from error
        raise
    if not session:
        return bundle
    place = path / CLIENT
    known = sorted({*list_outcomes(place), read_newest(place).get("session", "")} - {""})
    chosen = [name for name in known if name.startswith(session)]
    if len(chosen) != 1:
        count = "no session" if not chosen else "several sessions"
        there = f"it has {list_some(known)}" if known else "it has none"
        raise UsageError(f"{place} has the outcome of {count} named {session}...; {there}")
    client = PartyBundle.load(place, session=chosen[0])
    return replace(bundle, parties={**bundle.parties, CLIENT: client})


def _check_belonging(found: SavedState, bundle: Bundle, server: PartyBundle) -> None:
    """Check that a state is of the bundle, and of the same session and step as the client's part.

    Raises:
        BundleMismatch: it is not.
    """
    if found.digest != bundle.manifest.digest:
        raise BundleMismatch(
            "the bundle's digest",
            bundle.manifest.digest[:16],
            found.digest[:16],
            "name the server that serves the server's part of this bundle",
        )
    announced = State(tensors={}, step=found.step, session=found.session)
    try:
        _replace_server(bundle, server.with_state(announced)).check_steps()
    except BundleMismatch as error:
        error.advice = (
            f"merge with the client's folder as session {found.session[:8]} left it at step "
            f"{found.step}, or train on to the end, so that both sides save the same step"
        )
        raise


def _replace_server(bundle: Bundle, server: PartyBundle) -> Bundle:
    return replace(bundle, parties={**bundle.parties, SERVER: server})


def _measure(declared: Iterable[StateSpec]) -> int:
    """Compute the most bytes that the file of a state can have."""
    total = _MOST_FACTS
    for tensor in (spec.tensor for spec in declared):
        count = math.prod(dim for dim in tensor.shape if isinstance(dim, int))
        total += count * DTYPES[tensor.dtype].itemsize
        total += _MOST_ENTRY + 6 * len(tensor.name)  # JSON may escape each character
    return total


def _download(
    url: str, credentials: Credentials, found: SavedState, most: int, folder: str | Path | None
) -> memoryview:
    """Download a file, and map it; it has no name, so that nothing is left if this is killed."""
    with tempfile.TemporaryFile(dir=folder) as file:
        download_state(url, credentials, found, file, most=most)
        file.flush()
        if not found.nbytes:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _decode(content: memoryview, server: PartyBundle, found: SavedState, peer: str) -> State:
    """Decode a downloaded state, and check it against the manifest and its description.

    Raises:
        StateNotFetched: it is damaged, or something else.
    """
    path = Path(STATE)
    try:
        state = decode_outcome(path, content, server.manifest)
        check_finite_state(path, state.tensors, server.manifest.state)
    except (BundleError, FormatError, StateNotFinite) as error:
        raise StateNotFetched(peer, f"what it sent cannot be used: {error}") from error
    if (state.session, state.step) != (found.session, found.step):
        raise StateNotFetched(peer, "it sent another state than it announced")
    return state
