"""The web pages of a server: files that are read when the server starts and served by URL path.

Requests are answered only from these files in memory, never from the disk.  The pages are public,
because the page on which users enter their tokens cannot itself require a token.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from splitonnx.errors import UsageError
from splitonnx.files import read_regular
from splitonnx.runtime.edge.http import HttpRequest, HttpResponse

INDEX = "index.html"
PACKED = ".gz"
"""Suffix of the gzip version of a file, which is stored in the same folder."""
MAX_FILES = 256
"""Most files in one folder."""
MAX_FILE_BYTES = 64 << 20
"""Most bytes of one file; ONNX Runtime's largest build for browsers takes 28 MiB."""
MAX_BYTES = 128 << 20
"""Most bytes of all files in one folder, all of which are kept in memory."""

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".wasm": "application/wasm",
    ".txt": "text/plain; charset=utf-8",
}
"""Content types by file suffix; files with other suffixes are served as bytes."""
BYTES = "application/octet-stream"

# A page may only run this server's files and connect to this server.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; worker-src 'self'; manifest-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",  # the browser asks whether the file changed
    "Content-Security-Policy": CONTENT_POLICY,
    # Together these let a page share memory between threads, which ONNX Runtime needs.
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
}


@dataclass(frozen=True, kw_only=True)
class Page:
    """A file that belongs to the web pages.

    ``packed`` is the gzip version of the file, or ``None`` if there is none.  ``tag`` is its ETag.
    """

    content_type: str
    body: bytes = field(repr=False)
    packed: bytes | None = field(default=None, repr=False)
    tag: str


class Pages:
    """The web pages of a server, which are looked up by URL path."""

    def __init__(self, pages: Mapping[str, Page]) -> None:
        self._pages = dict(pages)

    def answer(self, request: HttpRequest) -> HttpResponse | None:
        """Return the response to a request for a page.

        The result is ``None`` if there is no such page, or if the request asks for a websocket.
        """
        path = unquote(request.path.partition("?")[0])
        page = self._pages.get(f"/{INDEX}" if path == "/" else path)
        if page is None or request.is_upgrade:
            return None
        headers = {**HEADERS, "ETag": page.tag}
        if page.tag in (tag.strip() for tag in request.known_tags.split(",")):
            return HttpResponse(HTTPStatus.NOT_MODIFIED, page.content_type, b"", headers)
        if page.packed is not None and _takes_gzip(request.encodings):
            headers["Content-Encoding"] = "gzip"
            return HttpResponse(HTTPStatus.OK, page.content_type, page.packed, headers)
        return HttpResponse(HTTPStatus.OK, page.content_type, page.body, headers)


def read_pages(folder: Path) -> Pages:
    """Read the web pages in a folder, except for hidden files.

    Raises:
        UsageError: ``index.html`` is missing, there are too many files, a file is too large or
            cannot be read, or a symbolic link leads outside the folder or to a hidden file.
    """
    if not (folder / INDEX).is_file():
        raise UsageError(f"{folder} has no {INDEX}; name a page's folder (`make web` builds one)")
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if not _is_hidden(name)]
    for name in names:
        _check_link(folder, name)
    contents = _read_files(folder, names)
    return Pages(
        {
            f"/{name}": _make_page(name, content, contents.get(f"{name}{PACKED}"))
            for name, content in contents.items()
            if not (name.endswith(PACKED) and name.removesuffix(PACKED) in contents)
        }
    )


def _read_files(folder: Path, names: Iterable[Path]) -> dict[str, bytes]:
    """Read files by their names in the folder; the resulting names have ``/`` as separator."""
    contents: dict[str, bytes] = {}
    total = 0
    for name in names:
        try:
            if len(contents) >= MAX_FILES:
                raise OSError(errno.EFBIG, "one file too many")
            content = read_regular(folder / name, min(MAX_FILE_BYTES, MAX_BYTES - total))
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise UsageError(f"{folder / name} cannot be read: {error.strerror}") from error
            raise UsageError(
                f"{folder} holds more than a server gives out: at most {MAX_FILES} files, "
                f"{MAX_FILE_BYTES >> 20} MiB each and {MAX_BYTES >> 20} MiB together"
            ) from error
        total += len(content)
        contents[name.as_posix()] = content
    return contents


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _check_link(folder: Path, name: Path) -> None:
    """Refuse a link out of the folder (path traversal), or to a file that is not served.

    Raises:
        UsageError: the file is such a link.
    """
    root = folder.resolve()
    target = (folder / name).resolve()
    if not target.is_relative_to(root) or _is_hidden(target.relative_to(root)):
        raise UsageError(
            f"{folder / name} is a link to a file that is not given out; put a copy in its place, "
            "or remove it"
        )


def _make_page(name: str, content: bytes, packed: bytes | None) -> Page:
    return Page(
        content_type=CONTENT_TYPES.get(PurePosixPath(name).suffix.lower(), BYTES),
        body=content,
        packed=packed,
        tag=f'"{hashlib.sha256(content).hexdigest()[:32]}"',
    )


def _takes_gzip(encodings: str) -> bool:
    """Return whether an ``Accept-Encoding`` header names gzip with a weight above zero."""
    for encoding in encodings.split(","):
        name, _, weight = encoding.partition(";")
        if name.strip().lower() == "gzip":
            return weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False
