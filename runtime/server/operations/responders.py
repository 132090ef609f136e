"""A server's answers to plain HTTP requests on its port.

:mod:`request_policies` has decided before that a request may be answered, and which roles its
sender has.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from http import HTTPStatus

import msgspec

from splitonnx.runtime.edge.client_files import ClientFiles
from splitonnx.runtime.edge.http import HttpRequest, HttpResponse, LaterResponse, ask_for
from splitonnx.runtime.edge.pages import Pages
from splitonnx.runtime.edge.tokens import Role
from splitonnx.runtime.scheduling.turns import Turns
from splitonnx.runtime.server.metrics import Metrics
from splitonnx.runtime.server.operations.session_tables import list_sessions
from splitonnx.runtime.server.operations.state_files import StateFiles
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.wire.saved_states import PIECE_BYTES, StateQuery, read_path
from splitonnx.runtime.wire.session_lists import PATH, encode_list

JSON = "application/json"


class Responder:
    """Answers the plain HTTP requests on the port of one server.

    ``is_stopping`` returns whether the server stops.  ``client_files`` and ``pages`` are what it
    offers for download; ``None`` if nothing is.  ``storage`` runs what
    reads files.  ``clock`` is the registry's.
    """

    def __init__(
        self,
        registry: Registry,
        metrics: Metrics,
        *,
        is_stopping: Callable[[], bool],
        storage: Turns,
        client_files: ClientFiles | None = None,
        pages: Pages | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._metrics = metrics
        self._is_stopping = is_stopping
        self._storage = storage
        self._states = StateFiles(registry.folder, registry.manifest.digest)
        self._client_files = client_files
        self._pages = pages
        self._clock = clock
        self._operations = {"/metrics": self._render_metrics, PATH: self._list_sessions}

    @property
    def has_pages(self) -> bool:
        """Return whether the server has web pages."""
        return self._pages is not None

    def respond(self, request: HttpRequest) -> HttpResponse | LaterResponse | None:
        """Answer a request, or return ``None`` for paths that the server does not have."""
        if request.path == "/health":
            return self._report_health()
        if (operation := self._operations.get(request.path)) is not None:
            if Role.OPERATE not in request.roles:
                return ask_for(Role.OPERATE, request)
            return operation(request)
        if (query := read_path(request.path)) is not None:
            return self._hand_out(query, request)
        files = self._client_files
        if files is not None and (part := files.answer(request.path)) is not None:
            return part if Role.TRAIN in request.roles else ask_for(Role.TRAIN, request)
        return None if self._pages is None else self._pages.answer(request)

    def _report_health(self) -> HttpResponse:
        status = "stopping" if self._is_stopping() else "ok"
        health = {"status": status, "sessions": len(self._registry.sessions)}
        return HttpResponse(HTTPStatus.OK, JSON, msgspec.json.encode(health))

    def _render_metrics(self, _: HttpRequest) -> HttpResponse:
        self._metrics.set_sessions(len(self._registry.sessions))
        self._metrics.set_rounds(self._registry.policy.report())
        return HttpResponse(HTTPStatus.OK, *self._metrics.render())

    def _list_sessions(self, request: HttpRequest) -> HttpResponse:
        has_token = request.token is not None
        found = list_sessions(self._registry, self._clock(), whole_ids=has_token)
        return HttpResponse(HTTPStatus.OK, JSON, encode_list(found))

    def _hand_out(self, query: StateQuery, request: HttpRequest) -> HttpResponse | LaterResponse:
        """Answer a question about a state, which takes a token with a role of its own."""
        if request.token is None and request.roles:
            reason = b"a server without tokens hands out no state; give it some (--token-file)\n"
            return HttpResponse(HTTPStatus.FORBIDDEN, "text/plain", reason)
        if Role.FETCH not in request.roles:
            return ask_for(Role.FETCH, request)
        read = partial(self._states.answer, query, request.owner)
        return LaterResponse(
            make=partial(self._storage.run, (Role.FETCH, request.owner), read), most=PIECE_BYTES
        )
