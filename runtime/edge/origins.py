"""Which web pages may connect and which names a server answers to, against DNS rebinding.

Browsers name the page's origin with every websocket; programs name none, and are not asked.  With
a plain request of its own origin a browser names no origin, but always the host that it asks for.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from splitonnx.errors import UsageError

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#\s@]+")


class Origins:
    """The origins that are let in.

    With ``has_pages`` the server gives out pages of its own, whose origin is the host that they ask
    for.  So is that of a page elsewhere whose name was pointed at this machine meanwhile (DNS
    rebinding): a name is not enough, unless the server ``is_locked`` by tokens or TLS, which such
    a page does not have.
    """

    def __init__(
        self, listed: frozenset[str], *, has_pages: bool, is_locked: bool, host: str = ""
    ) -> None:
        self._listed = listed
        self._names = {strip_port(origin.partition("://")[2]) for origin in listed} | {host}
        self._has_pages = has_pages
        self._is_locked = is_locked

    def allow(self, origin: str, host: str | None) -> bool:
        """Return whether a page of ``origin`` may connect to the server by the name ``host``."""
        if origin in self._listed:
            return True
        if not self._has_pages or not host or origin not in (f"http://{host}", f"https://{host}"):
            return False
        return self._is_locked or is_fixed(host)

    def answers_to(self, host: str | None) -> bool:
        """Return whether a plain request for ``host`` is answered.

        A page of a name that the DNS turned to this machine could read the answer, so unless the
        server is locked, the host must be an address, ``localhost``, the one that the server
        listens on by name, or that of an origin that is listed.  Without one it is not a browser.
        """
        return self._is_locked or not host or strip_port(host) in self._names or is_fixed(host)


def strip_port(host: str) -> str:
    """Return a request's ``Host`` without its port, in lower case."""
    return re.sub(r":\d*$", "", host).lower()


def is_fixed(host: str) -> bool:
    """Return whether a request's ``Host`` is an address, which DNS rebinding cannot change."""
    name = strip_port(host)
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def check_origins(origins: Sequence[str]) -> frozenset[str]:
    """Check the origins of web pages that may connect, such as ``https://lab.example``.

    Raises:
        UsageError: one is not an origin.
    """
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise UsageError(
                f"'{origin}' is not an origin; an origin is a scheme, a host and perhaps a port, "
                "in lower case and without a path, such as https://lab.example or "
                "http://localhost:3000"
            )
    return frozenset(origins)
