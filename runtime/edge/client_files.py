"""The files of the client's part of a bundle, which a server offers for download.

Browsers download these files, because a browser has no bundle folder.  They are the manifest and
the files that it names; a trained state is never included.  The server decides who may download the
files.
"""

from __future__ import annotations

from http import HTTPStatus
from pathlib import Path

from splitonnx.bundles import WEIGHTS, PartyBundle
from splitonnx.errors import UsageError
from splitonnx.manifests import MANIFEST, PartyManifest
from splitonnx.runtime.edge.http import HttpResponse

FOLDER = "/client/"
"""URL path of the files on the server."""

_BINARY = "application/octet-stream"


class ClientFiles:
    """The files of the client's part that a server offers for download.

    Args:
        client: the client's folder, or the client's part if it is already loaded.
        server: the manifest of the server's part.

    Raises:
        BundleError, FormatError: the folder cannot be used.
        UsageError: ``client`` is not the client's part of the server's bundle.
    """

    def __init__(self, client: str | Path | PartyBundle, server: PartyManifest) -> None:
        party = (
            client if isinstance(client, PartyBundle) else PartyBundle.load(client, is_held=True)
        )
        if party.manifest.party == server.party or party.manifest.digest != server.digest:
            raise UsageError("the client's part is of another bundle than the part that is served")
        manifest, weights = party.encode()
        self._files = {MANIFEST: manifest, WEIGHTS: b"".join(weights), **party.graphs}

    def answer(self, path: str) -> HttpResponse | None:
        """Return the response for a URL path, or ``None`` if the path is not under ``/client/``."""
        if not path.startswith(FOLDER):
            return None
        name = path.removeprefix(FOLDER)
        if name not in self._files:
            return HttpResponse(
                HTTPStatus.NOT_FOUND, "text/plain", b"the client's part has no such file\n"
            )
        kind = "application/json" if name == MANIFEST else _BINARY
        return HttpResponse(HTTPStatus.OK, kind, self._files[name])
