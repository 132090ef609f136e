"""Checks of a request's origin and host, which protect a server against DNS rebinding.

Browsers send the page's origin with every websocket handshake.  Other programs send no origin and
are not checked.  In a plain HTTP request to the page's own server, the browser sends no origin, but
it always sends the requested host.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from splitonnx.errors import UsageError

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s@]+")


class Origins:
    """The web origins whose pages may connect to a server.

    ``listed`` contains the origins that may always connect.  ``has_pages`` means that the server
    has web pages of its own, which may connect as well.  Their origin matches the requested host.
    In a DNS rebinding attack, however, an attacker's page matches too, because the attacker has
    made the page's host name resolve to this machine.  Therefore, a matching host is accepted only
    if it is an IP address or ``localhost``, or if ``is_locked`` is true.  A locked server requires
    tokens or TLS, so that an attacker's page cannot connect to it.  ``host`` is the address that
    the server listens on.
    """

    def __init__(
        self, listed: frozenset[str], *, has_pages: bool, is_locked: bool, host: str = ""
    ) -> None:
        self._listed = listed
        self._names = {strip_port(origin.partition("://")[2]) for origin in listed} | {host}
        self._has_pages = has_pages
        self._is_locked = is_locked

    def allow(self, origin: str, host: str | None) -> bool:
        """Return whether a page from ``origin`` may connect if it sends its request to ``host``."""
        if origin in self._listed:
            return True
        if not self._has_pages or not host or origin not in (f"http://{host}", f"https://{host}"):
            return False
        return self._is_locked or is_fixed(host)

    def answers_to(self, host: str | None) -> bool:
        """Return whether the server answers a plain HTTP request for ``host``.

        In a DNS rebinding attack, an attacker's page could read the answer.  Therefore, unless the
        server is locked, the requested host must be an IP address, ``localhost``, the name that the
        server listens on, or the host of a listed origin.  A request without a host is answered,
        because it does not come from a browser.
        """
        return self._is_locked or not host or strip_port(host) in self._names or is_fixed(host)


def strip_port(host: str) -> str:
    """Return a ``Host`` header without the port, in lower case."""
    return re.sub(r":\d*$", "", host).lower()


def is_fixed(host: str) -> bool:
    """Return whether a ``Host`` header is ``localhost`` or an IP address.

    DNS rebinding cannot redirect these hosts to another machine.
    """
    name = strip_port(host)
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def check_origins(origins: Sequence[str]) -> frozenset[str]:
    """Check the web origins that may connect, such as ``https://lab.example``, and return them.

    Raises:
        UsageError: an entry is not an origin.
    """
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise UsageError(
                f"'{origin}' is not an origin; an origin is a scheme, a host and perhaps a port, "
                "in lower case and without a path, such as https://lab.example or "
                "http://localhost:3000"
            )
    return frozenset(origins)
