"""The exceptions that msgspec raises for text that is not JSON of the expected type."""

from __future__ import annotations

import msgspec

JSON_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""A RecursionError means that arrays or objects are nested too deeply, in any field."""
