"""The trained states in a server's folder, for those who may fetch them.

A state is fetched as its file is on disk: what a session published as the outcome of its training.
Nothing is saved for this, because a client has an outcome only after the server has saved its own.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from pathlib import Path

from splitonnx.checksums import CHECKSUM
from splitonnx.errors import BundleError
from splitonnx.runtime.edge.http import HttpResponse
from splitonnx.runtime.storage.outcome_files import OutcomeFile, opening_outcome
from splitonnx.runtime.wire.saved_states import (
    NOT_SAVED,
    PIECE_BYTES,
    SAVED_ANEW,
    SavedState,
    StateQuery,
    encode_description,
)

_TEXT = "text/plain"

_logger = logging.getLogger("splitonnx.server")


class StateFiles:
    """The outcomes in the folder of a server's part; safe to use from several threads.

    ``folder`` is ``None`` for a bundle in memory, which has none.  ``digest`` is the bundle's.
    """

    def __init__(self, folder: Path | None, digest: str) -> None:
        self._folder = folder
        self._digest = digest

    def answer(self, query: StateQuery, owner: str) -> HttpResponse:
        """Read the answer to a question from disk.

        The answer about another owner's session is the same as about one that does not exist.  The
        outcome of a session without an owner is for everyone who may fetch.
        """
        try:
            if self._folder is None:
                return self._answer(query, None, owner)
            with opening_outcome(self._folder, query.session) as found:
                return self._answer(query, found, owner)
        except BundleError as error:
            _logger.error("session %s: %s", query.session, error)  # the client may not see the path
            reason = b"the state cannot be read; the server's log says why\n"
            return HttpResponse(HTTPStatus.INTERNAL_SERVER_ERROR, _TEXT, reason)

    def _answer(self, query: StateQuery, found: OutcomeFile | None, owner: str) -> HttpResponse:
        if found is None or found.metadata.get("owner", "") not in ("", owner):
            return HttpResponse(HTTPStatus.NOT_FOUND, _TEXT, f"{NOT_SAVED}\n".encode())
        state = self._read_facts(query.session, found)
        if not query.checksum:
            _logger.info("session %s: step %d is fetched by '%s'", state.session, state.step, owner)
            return HttpResponse(HTTPStatus.OK, "application/json", encode_description(state))
        if query.checksum != state.checksum or query.offset >= state.nbytes:
            return HttpResponse(HTTPStatus.GONE, _TEXT, f"{SAVED_ANEW}\n".encode())
        piece = found.read(query.offset, PIECE_BYTES)
        return HttpResponse(HTTPStatus.OK, "application/octet-stream", piece)

    def _read_facts(self, session: str, found: OutcomeFile) -> SavedState:
        facts = found.metadata
        step, digest = facts.get("step", ""), facts.get("digest", "")
        if CHECKSUM not in facts or digest != self._digest or not step.isdecimal():
            reason = f"the outcome of session {session} is of another bundle or version"
            raise BundleError(str(self._folder), reason)
        return SavedState(
            digest=digest,
            session=session,
            step=int(step),
            nbytes=found.nbytes,
            checksum=facts[CHECKSUM],
        )
