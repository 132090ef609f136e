"""Write the errors of ONNX Runtime as sentences about nodes, without its codes and source lines."""

from __future__ import annotations

import re

UNLOADABLE = "a node cannot be loaded"
"""The beginning of the sentence for a node whose attributes a kernel refuses."""
_CODE = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : ")
_FAILED = re.compile(
    r"Non-zero status code returned while running (\w+) node\. Name:'([^']*)' Status Message: "
)
_LOADING = "Exception during initialization: "
_LINE = re.compile(r"(\S+\.(?:cc|cpp|cu|h|hpp):\d+) ")
_CONDITION = re.compile(r".*? was false\. (?=\S)")
_SIGNATURE = re.compile(
    r"[^(]*(?:\([^()]*\)::[^(]*)*\((?:[^()]|\([^()]*\))*\)(?: const)?(?: \[with [^\]]*\])? "
)
_FUNCTION = re.compile(r"[\w:]+ (?=\S)")
_SIZES = re.compile(
    r"Got invalid dimensions for input: (.+?) for the following indices"
    r"((?: index: \d+ Got: \d+ Expected: \d+)+)"
)
_SIZE = re.compile(r"index: (\d+) Got: (\d+) Expected: (\d+)")


def describe_kernel_error(text: str) -> str:
    """Return what ONNX Runtime says in an error, in one line that begins with the node.

    Its error codes, and the files, functions and conditions of its source, are left out.
    """
    line = _CODE.sub("", " ".join(text.split()))
    failed = _FAILED.search(line)
    if failed is not None:
        kind, name = failed.groups()
        node = f"node '{name}' ({kind})" if name else f"a node ({kind})"
        return f"{node} fails: {describe_kernel_error(line[failed.end() :]) or 'no reason given'}"
    if line.startswith(_LOADING):
        reason = _leave_out_source(line.removeprefix(_LOADING))
        return f"{UNLOADABLE}: {reason or 'no reason given'}"
    sizes = _SIZES.search(line)
    if sizes is not None:
        found = (f"axis {axis} is {got}, not {due}" for axis, got, due in _SIZE.findall(sizes[2]))
        return f"input '{sizes[1]}' has other sizes than the graph declares: {', '.join(found)}"
    return _leave_out_source(line)


def _leave_out_source(line: str) -> str:
    place = _LINE.match(line)
    if place is None:
        return line
    rest = line[place.end() :]
    has_signature = place[1].startswith("/")
    for known in (_CONDITION, _SIGNATURE if has_signature else _FUNCTION):
        found = known.match(rest)
        if found is not None:
            return rest[found.end() :]
    return rest
