"""Which web pages may connect: those of the origins that are listed, and the server's own.

Browsers name the page's origin with every websocket; programs name none, and are not asked.
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
    for.  So is that of a stranger's page whose name the DNS turned to this machine's address
    meanwhile: unless ``is_locked``, by what such a page has not, a name is not enough.
    """

    def __init__(self, listed: frozenset[str], *, has_pages: bool, is_locked: bool) -> None:
        self._listed = listed
        self._has_pages = has_pages
        self._is_locked = is_locked

    def allow(self, origin: str, host: str | None) -> bool:
        """Say whether a page of ``origin`` may connect, which asked for ``host``."""
        if origin in self._listed:
            return True
        if not self._has_pages or not host or origin not in (f"http://{host}", f"https://{host}"):
            return False
        return self._is_locked or is_fixed(host)


def is_fixed(host: str) -> bool:
    """Say whether a request's ``Host`` is an address, which no name server has a say in."""
    name = re.sub(r":\d+$", "", host)
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
        UsageError: one is no origin.
    """
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise UsageError(
                f"'{origin}' is no origin; an origin is a scheme, a host and perhaps a port, in "
                "lower case and without a path, such as https://lab.example or "
                "http://localhost:3000"
            )
    return frozenset(origins)
