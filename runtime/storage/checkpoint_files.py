"""The names of checkpoints' files, and the sessions that have any in a party's folder."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from splitonnx.errors import BundleError
from splitonnx.states import is_session

SESSIONS = "sessions"
"""The name of the folder in a party's folder that contains a folder for each session."""
STOPPED = "stopped.safetensors"
STEP = re.compile(r"(0|[1-9][0-9]*)(\.best)?\.safetensors", re.ASCII)
"""The name of the file of a checkpoint, with its step."""


def list_sessions(folder: Path) -> tuple[str, ...]:
    """Return the sessions that have a checkpoint in a party's folder, most recently written first.

    The checkpoints are not validated.

    Raises:
        BundleError: the folder cannot be read.
    """
    written: list[tuple[int, str]] = []
    for session in list_folders(folder):
        place = folder / SESSIONS / session
        names = [n for n in list_names(place) if n == STOPPED or STEP.fullmatch(n)]
        with contextlib.suppress(FileNotFoundError):  # the session ended meanwhile
            times = [(place / name).stat().st_mtime_ns for name in names]
            written += [(max(times), session)] if times else []
    return tuple(session for _, session in sorted(written, reverse=True))


def list_folders(folder: Path) -> list[str]:
    """Return the sessions that have a folder in a party's folder, in no particular order.

    Raises:
        BundleError: the folder cannot be read.
    """
    return [name for name in list_names(folder / SESSIONS) if is_session(name)]


def name_step(step: int, *, keep: bool = False) -> str:
    """Return the name of a checkpoint's file; ``keep`` means that training may return to it."""
    return f"{step}.best.safetensors" if keep else f"{step}.safetensors"


def is_best(path: Path) -> bool:
    """Return whether training may return to this checkpoint at its end."""
    return path.name.endswith(".best.safetensors")


def list_names(folder: Path) -> list[str]:
    """Return the names of the files in a folder; none if it does not exist.

    Raises:
        BundleError: the folder cannot be read.
    """
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BundleError(str(folder), f"it cannot be read: {error.strerror}") from error
