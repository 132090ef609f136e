"""Scripts of what happens to a client's exchange with its server.

A script is a list of entries: asks of the caller, and events from outside.  The module
``exchange_players`` plays them, and records what the exchange wants done and tells after each.  The
recordings are vectors for every client and every shell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SESSION = "5" * 32
Entry = Sequence[Any]

START: list[Entry] = [["start", False], ["connected"], ["welcome", {}]]
WIDENED: list[Entry] = [
    *START,
    ["widen", 2],
    ["wake"],
    ["connected"],
    ["welcome", {"in_flight": 2}],
]
RECONNECT: list[Entry] = [["lost"], ["wake"], ["connected"]]
FIRST = ("accumulate", 0, 0)
SECOND = ("accumulate", 0, 1)
TRAIN = ("train", 0, 0)

SCRIPTS: Mapping[str, list[Entry]] = {
    "a step": [*START, ["send", *TRAIN], ["reply", *TRAIN, 0], ["end", *TRAIN], ["close", True]],
    "a client that is refused": [
        ["start", False],
        ["connected"],
        ["fault", "SessionLost", "no step in common", 0],
    ],
    "a server that is away at the start": [["start", False], ["lost"]],
    "a patient client": [
        ["start", True],
        ["wake"],
        ["lost"],
        ["wake"],
        ["connected"],
        ["fault", "ServerBusy", "sessions", 0],
        ["wake"],
        ["connected"],
        ["welcome", {}],
    ],
    "an earlier generation": [
        ["start", False],
        ["connected"],
        ["fault", "StaleConnection", "", 7],
        ["connected"],
        ["welcome", {}],
    ],
    "a lost reply": [
        *START,
        ["send", *TRAIN],
        *RECONNECT,
        ["welcome", {}],
        ["reply", *TRAIN, 0],
        ["end", *TRAIN],
    ],
    "a reply that comes again": [
        *START,
        ["send", *TRAIN],
        ["reply", *TRAIN, 0],
        ["send", *TRAIN],
        *RECONNECT,
        ["welcome", {}],
        ["reply", *TRAIN, 0],
        ["reply", *TRAIN, 1],
    ],
    "a reply out of order": [*START, ["send", *TRAIN], ["reply", *TRAIN, 1]],
    "a reply that nobody asked for": [*START, ["reply", *TRAIN, 0]],
    "two tasks in flight": [
        *WIDENED,
        ["send", *FIRST],
        ["send", *SECOND],
        ["reply", *FIRST, 0],
        ["end", *FIRST],
        ["reply", *SECOND, 0],
        ["end", *SECOND],
    ],
    "two tasks in flight, sent again in order": [
        *WIDENED,
        ["send", *FIRST],
        ["send", *SECOND],
        ["reply", *FIRST, 0],
        ["send", *FIRST],
        *RECONNECT,
        ["welcome", {"in_flight": 2}],
        ["reply", *FIRST, 0],
        ["reply", *SECOND, 0],
        ["reply", *FIRST, 1],
    ],
    "a first task that has ended is not sent again": [
        *WIDENED,
        ["send", *FIRST],
        ["send", *SECOND],
        ["reply", *FIRST, 0],
        ["end", *FIRST],
        *RECONNECT,
        ["welcome", {"in_flight": 2}],
        ["reply", *SECOND, 0],
    ],
    "a task that ends while its replies come again": [
        *WIDENED,
        ["send", *FIRST],
        ["send", *SECOND],
        ["reply", *FIRST, 0],
        *RECONNECT,
        ["welcome", {"in_flight": 2}],
        ["end", *FIRST],
        ["reply", *FIRST, 0],
        ["reply", *SECOND, 0],
        ["reply", *FIRST, 0],
    ],
    "a server that permits fewer tasks than are open": [
        *WIDENED,
        ["send", *FIRST],
        ["send", *SECOND],
        *RECONNECT,
        ["welcome", {}],
    ],
    "an earlier server, which permits one task": [
        *START,
        ["widen", 4],
        ["wake"],
        ["connected"],
        ["welcome", {}],
        ["widen", 4],
    ],
    "a server that lost micro-batches": [
        *START,
        ["send", *FIRST],
        ["reply", *FIRST, 0],
        ["end", *FIRST],
        ["send", *SECOND],
        *RECONNECT,
        ["welcome", {"restarts": True}],
    ],
    "a step that begins again after its replies were to come again": [
        *WIDENED,
        ["send", *FIRST],
        ["send", *SECOND],
        ["reply", *FIRST, 0],
        ["end", *FIRST],
        ["reply", *SECOND, 0],
        *RECONNECT,
        ["welcome", {"in_flight": 2}],
        *RECONNECT,
        ["welcome", {"in_flight": 2, "restarts": True}],
        ["end", *SECOND],
        ["send", *FIRST],
        ["send", *SECOND],
        ["reply", *FIRST, 0],
        ["reply", *SECOND, 0],
    ],
    "a connection that is lost between two micro-batches": [
        *START,
        ["send", *FIRST],
        ["reply", *FIRST, 0],
        ["end", *FIRST],
        *RECONNECT,
        ["welcome", {}],
        ["send", *SECOND],
        ["reply", *SECOND, 0],
    ],
    "a server that misses the end of the last step": [
        *START,
        ["send", *TRAIN],
        ["reply", *TRAIN, 0],
        ["send", *TRAIN],
        ["end", *TRAIN],
        ["step", 1],
        ["send", "train", 1, 0],
        *RECONNECT,
        ["welcome", {"wants_repeat": True, "step": 1}],
        ["reply", *TRAIN, 0],
        ["reply", "train", 1, 0, 0],
    ],
    "a server that wants what is gone": [
        *START,
        ["send", *TRAIN],
        *RECONNECT,
        ["welcome", {"wants_repeat": True}],
    ],
    "a server that lost a step": [
        *START,
        ["step", 1],
        ["send", "train", 1, 0],
        *RECONNECT,
        ["welcome", {"step": 0}],
    ],
    "a state that is saved": [*START, ["save", 0, False, False], ["saved", 0, False]],
    "a state that is not saved": [*START, ["save", 0, True, False], ["unsaved", 0, "disk full"]],
    "a state that an earlier server cannot keep": [
        *START,
        ["save", 0, False, True],
        ["saved", 0, False],
    ],
    "another state saved": [*START, ["save", 0, False, False], ["saved", 3, False]],
    "a save that is asked for again": [
        *START,
        ["save", 0, False, False],
        *RECONNECT,
        ["welcome", {}],
        ["saved", 0, False],
    ],
    "a return to an earlier step": [
        *START,
        ["return_to_step"],
        ["wake"],
        ["connected"],
        ["welcome", {}],
    ],
    "a connection that was replaced": [*START, ["send", *TRAIN], ["replaced"]],
    "a session that is kept": [*START, ["close", False], ["close", False]],
    "a closed exchange": [*START, ["close", True], ["send", *TRAIN]],
}
"""Scripts by what they are about."""
