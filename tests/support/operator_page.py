"""docs/operators.md: the state of every ONNX operator, as the node cases find it.

    python -m tests.support.operator_page

writes the page anew; a test holds the page that is there against what the cases say now.
"""

from __future__ import annotations

import pickle
import re
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
from filelock import FileLock

from tests.conftest import ROOT
from tests.support.case_trials import TARGETS, Outcome, try_case
from tests.support.node_cases import is_tensors_only, list_node_cases

PAGE = ROOT / "docs" / "operators.md"

NATIVE, REWRITTEN = "native", "rewritten"
PASSED, UNDIFFERENTIABLE, UNSUPPORTED = "passed through", "not differentiable", "not supported"
UNTESTED = "no case"

_INTRODUCTION = """\
# Operators

Written by `python -m tests.support.operator_page` with onnx {onnx}; a test checks that it is fresh.

Each operator is tried in every test case of tensors that the onnx package has for it, on both
targets: the case's float inputs become parameters, the model is cut, and its gradients are
compared with central differences in float64 by onnx's own reference evaluator, which must agree
within 1e-3 of the largest entry. {differentiable} operators are differentiable.

| status | operators (training) | means |
| --- | --: | --- |
| native | {native} | differentiated as it is |
| rewritten | {rewritten} | written in other operators before differentiation |
| passed through | {passed} | runs forward; integers, truth values and shapes have no gradient |
| not differentiable | {undifferentiable} | allowed where no gradient must pass |
| not supported | {unsupported} | refused by name |
| no case | {untested} | the onnx package has no case of tensors for it |

Models of opset 7 to {opset} are taken; what they hold is brought to opset 18 to 21 first.

| operator | training | portable | cases | remark |
| --- | --- | --- | --: | --- |
"""


_DRAWING = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_ELSEWHERE = dict.fromkeys(
    ("Multinomial", *_DRAWING),
    "draws at random, so no case can be compared",
)
"""What is said of operators whose cases cannot be compared."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One operator: its status on each target, and over how many cases that was found."""

    operator: str
    statuses: Mapping[str, str]
    cases: int
    remark: str = ""


_shared: list[Path] = []


def share_trials(folder: Path) -> None:
    """Keep what is tried in a folder, which several processes may share."""
    _shared[:] = [folder]


@cache
def try_operator(operator: str) -> tuple[Outcome, ...]:
    """Try every case of an operator on both targets, once per process or per shared folder."""
    if not _shared:
        return _try_operator(operator)
    file = _shared[0] / f"{operator}.pickle"
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            file.write_bytes(pickle.dumps(_try_operator(operator)))
        outcomes: tuple[Outcome, ...] = pickle.loads(file.read_bytes())
    return outcomes


def _try_operator(operator: str) -> tuple[Outcome, ...]:
    cases = [case for case in list_node_cases(operator) if is_tensors_only(case)]
    return tuple(outcome for case in cases for outcome in try_case(case))


def list_operators() -> list[str]:
    """List every operator of ONNX's own domain, those included that only old models hold."""
    schemas = onnx.defs.get_all_schemas_with_history()
    return sorted({schema.name for schema in schemas if schema.domain == ""})


def describe_operator(operator: str) -> Row:
    """Sum up what the cases of an operator came to."""
    outcomes = try_operator(operator)
    refused = [outcome for outcome in outcomes if outcome.refusal]
    names = {outcome.case for outcome in refused}
    cases = len({outcome.case for outcome in outcomes})
    remark = _ELSEWHERE.get(operator, "")
    if refused and len(names) < cases:
        remark = f"{len(names)} refused: {_shorten(refused[0].refusal)}"
    elif refused:
        remark = _shorten(refused[0].refusal)
    return Row(
        operator=operator,
        statuses={
            target: _find_status([o for o in outcomes if o.target == target]) for target in TARGETS
        },
        cases=cases,
        remark=remark,
    )


def _find_status(outcomes: Sequence[Outcome]) -> str:
    taken = [outcome for outcome in outcomes if not outcome.refusal]
    if not outcomes:
        return UNTESTED
    if not taken:
        alike = all(outcome.undifferentiable for outcome in outcomes)
        return UNDIFFERENTIABLE if alike else UNSUPPORTED
    differentiated = [outcome for outcome in taken if outcome.error is not None]
    if not differentiated:
        return PASSED
    return REWRITTEN if any(outcome.rewritten for outcome in differentiated) else NATIVE


def _shorten(sentence: str) -> str:
    """Leave the node's name and the advice out of an error's sentence."""
    reason = re.sub(r"^node '[^']*' \((\w+)\)", r"\1", sentence).split("; ")[0]
    return reason.replace("|", "\\|")


def write_page(rows: Sequence[Row]) -> str:
    """Write the page's text."""
    counts = Counter(row.statuses["training"] for row in rows)
    differentiable = sum(
        all(status in (NATIVE, REWRITTEN) for status in row.statuses.values()) for row in rows
    )
    lines = [
        f"| {row.operator} | {row.statuses['training']} | {row.statuses['portable']} "
        f"| {row.cases} | {row.remark} |"
        for row in rows
    ]
    introduction = _INTRODUCTION.format(
        onnx=onnx.__version__,
        opset=onnx.defs.onnx_opset_version(),
        differentiable=differentiable,
        native=counts[NATIVE],
        rewritten=counts[REWRITTEN],
        passed=counts[PASSED],
        undifferentiable=counts[UNDIFFERENTIABLE],
        unsupported=counts[UNSUPPORTED],
        untested=counts[UNTESTED],
    )
    return introduction + "\n".join(lines) + "\n"


def main() -> int:
    """Write the page."""
    PAGE.write_text(write_page([describe_operator(name) for name in list_operators()]))
    return 0


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sys.exit(main())
