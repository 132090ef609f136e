"""The two clients' numbers: the same in Python and in TypeScript, or different and meant so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from splitonnx import (
    bundles,
    codecs,
    graph_limits,
    manifests,
    messages,
    micro_batches,
    operators,
    pipelines,
    states,
    tensors,
)
from splitonnx.runtime.channels import credentials, exchanges, retries, websockets
from splitonnx.runtime.client import runners, training_loops
from splitonnx.runtime.storage import checkpoints
from splitonnx.runtime.wire import close_codes

SOURCES = Path(__file__).parents[1] / "runtime" / "js" / "src"

SAME: dict[str, float] = {
    "retries.FIRST_DELAY": retries.FIRST_DELAY,
    "retries.LONGEST_DELAY": retries.LONGEST_DELAY,
    "bundles.MAX_FILE_HEADER": states.MAX_HEADER,
    "checkpoints.KEPT": checkpoints.KEPT,
    "close_codes.POLICY": close_codes.POLICY,
    "close_codes.TOO_BIG": close_codes.TOO_BIG,
    "codecs.ALIGNMENT": codecs.ALIGNMENT,
    "exchanges.GREETINGS": exchanges.GREETINGS,
    "expressions.LARGEST": tensors.LARGEST,
    "graph_limits.MAX_ATTRIBUTES": graph_limits.STAGE.attributes,
    "graph_limits.MAX_DEPTH": graph_limits.STAGE.depth,
    "graph_limits.MAX_ELEMENTS": graph_limits.STAGE.elements,
    "graph_limits.MAX_FIELDS": graph_limits.STAGE.fields,
    "graph_limits.MAX_NAMES": graph_limits.STAGE.names,
    "graph_limits.MAX_NAME_BYTES": graph_limits.STAGE.name_bytes,
    "graph_limits.MAX_NODES": graph_limits.STAGE.nodes,
    "graph_limits.MAX_RANK": graph_limits.STAGE.rank,
    "graph_limits.MAX_TEXT_BYTES": graph_limits.STAGE.text_bytes,
    "graph_limits.MAX_TYPE_DEPTH": graph_limits.STAGE.type_depth,
    "manifests.MAX_SLOTS": manifests.MAX_SLOTS,
    "messages.MAX_HEADER": messages.MAX_HEADER,
    "messages.PROTOCOL": messages.PROTOCOL,
    "micro_batches.MOST_IN_FLIGHT": micro_batches.MOST_IN_FLIGHT,
    "operators.HIGHEST_IR_VERSION": operators.HIGHEST_IR_VERSION,
    "operators.HIGHEST_OPSET": operators.HIGHEST_OPSET,
    "operators.HIGHEST_TRAINING_OPSET": operators.HIGHEST_TRAINING_OPSET,
    "pipelines.USUAL_IN_FLIGHT": pipelines.USUAL_IN_FLIGHT,
    "runners.MOST_RESTARTS": runners.MOST_RESTARTS,
    "training_loops.MOST_RETURNS": training_loops.MOST_RETURNS,
    "websockets.MAX_REPLY": credentials.MESSAGE_BYTES,
    "websockets.OPEN_SECONDS": websockets.OPEN_SECONDS,
    "messages.REPLACED": messages.REPLACED,
    "websockets.REPLY_SECONDS": websockets.REPLY_SECONDS,
}
LESS_ON_A_PHONE: dict[str, tuple[int, int]] = {
    "bundles.MAX_MANIFEST": (16 << 20, manifests.MAX_MANIFEST),
    "bundles.MAX_GRAPH": (256 << 20, bundles.MAX_GRAPH),
}
"""TypeScript's and Python's; the comments beside them say why."""
ALONE = {
    "close_codes.NORMAL",
    "protobufs.BYTES",
    "protobufs.NUMBER",
    "schemas.STRINGS",
    "websockets.MAX_WAITING",
}
"""What Python has not under a name: its websockets wait themselves, and its formats are enums."""

_CONSTANT = re.compile(r"^export const ([A-Z_]+) = ([0-9._]+)(?: (<<|\*\*) (\d+))?( - 1)?;", re.M)


def read_constants() -> dict[str, float]:
    """Read the numbers that TypeScript's modules export by a name in capitals."""
    found: dict[str, float] = {}
    for source in SOURCES.rglob("*.ts"):
        for name, number, sign, power, less in _CONSTANT.findall(source.read_text()):
            value = float(number.replace("_", ""))
            if sign:
                value = value * 2 ** int(power) if sign == "<<" else value ** int(power)
            found[f"{source.stem}.{name}"] = value - 1 if less else value
    return found


FOUND = read_constants()


@pytest.mark.parametrize("name", SAME)
def test_a_number_is_the_same_in_both(name: str) -> None:
    assert FOUND[name] == SAME[name]


@pytest.mark.parametrize("name", LESS_ON_A_PHONE)
def test_a_limit_that_is_meant_to_be_less_on_a_phone_is(name: str) -> None:
    expected, python = LESS_ON_A_PHONE[name]
    assert FOUND[name] == expected < python


def test_no_number_of_typescript_is_left_out_of_these_tables() -> None:
    assert FOUND.keys() == SAME.keys() | LESS_ON_A_PHONE.keys() | ALONE
