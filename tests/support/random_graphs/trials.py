"""Cut a drawn model, and hold what comes of it against onnx's own evaluator in float64.

Nothing of the comparison that ``cut`` makes is used: the values that are right are computed here.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from splitonnx.bundles import Bundle
from splitonnx.errors import SplitonnxError
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import inspect
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from tests.support.case_trials import TARGETS, run_step
from tests.support.oracles import (
    LOSSES,
    STEP,
    differentiate_numerically,
    make_evaluator,
    to_double,
    to_inference,
)
from tests.support.random_graphs.models import Drawn

Arrays = dict[str, np.ndarray]

MISTAKES = ("DifferentResult", "ForbiddenOperator", "InternalModelError", "NativeCrash")
"""Errors that no model of the standard should meet."""
FOUNDED = (
    "leaves out",
    "rounding leaves little",
    "differs by",
    "was not compared",
    "only raw inputs are scaled",
    "a single number and not trained",
    "single numbers and not trained",
    "is a sum over the batch",
    "which most networks do not learn",
    "squashed twice",
    "looks like probabilities",
    "a batch of 1",
    "the last axis",
    "numbers at a time",
)
"""Parts of remarks that are no false alarm: of outputs, rounding, missing kernels and advice."""
NARROW = "the merged one"
"""Part of the remark on normalizations that are exact in the parts alone."""
CONTRADICTION = "onnx's reference evaluator and ONNX Runtime differ"
TOLERATED = 1e-3
"""Difference up to which a remark is enough."""
EXACT = 1e-5
"""Relative difference up to which results are equal, unless float32 itself is farther off."""
NOISE = 20
"""Multiples of the difference between float32 and float64 that count as equal, too."""
SLOPE = 2e-3
"""Difference of gradients up to which they are equal, relative to the largest one."""


@dataclass(kw_only=True)
class Outcome:
    """What came of a drawn model.

    ``refusal`` is the sentence with which it was refused, and ``remarks`` are those of the
    comparison.  ``off`` holds the differences from the right values, by what was compared.
    ``noise`` is that of plain float32, ``slopes`` counts the gradients' entries that were compared,
    and ``trouble`` says what should not have happened.
    """

    refusal: str = ""
    kind: str = ""
    remarks: list[str] = field(default_factory=list)
    off: dict[str, float] = field(default_factory=dict)
    noise: float = 0.0
    slopes: int = 0
    trouble: list[str] = field(default_factory=list)

    @property
    def allowed(self) -> float:
        return max(EXACT, NOISE * self.noise)

    @property
    def complaints(self) -> list[str]:
        """List what is a mistake: a difference, a crash, or an alarm without a reason."""
        said = TOLERATED if any("differs by" in remark for remark in self.remarks) else 0
        narrow = any(NARROW in remark for remark in self.remarks)
        found = [
            f"{name}: off by {size:.1e}"
            for name, size in self.wrong.items()
            if size > (TOLERATED if narrow and name.startswith("merged") else said)
        ]
        if self.kind in MISTAKES:
            found.append(self.refusal)
        return found + self.trouble

    @property
    def wrong(self) -> dict[str, float]:
        """The differences that are larger than rounding explains."""
        return {name: size for name, size in self.off.items() if not size <= self.allowed}


def try_model(drawn: Drawn, *, slopes: bool, rows: int = 3, seed: int = 11) -> Outcome:
    """Cut a model where it was drawn to be cut, and compare predictions, loss and gradients."""
    outcome = Outcome()
    data = drawn.data(rows, seed)
    expected = _evaluate(to_double(to_inference(drawn.model)), _widen(data))
    outcome.noise = _find_noise(drawn.model, data, expected)
    try:
        with _noting(outcome.remarks):
            bundle = _cut(drawn)
    except SplitonnxError as error:
        outcome.refusal, outcome.kind = str(error), type(error).__name__
        return outcome
    outcome.trouble += _judge_remarks(outcome, drawn.model, data, expected)
    try:
        found = {"the parts": _predict(bundle, data), "merged": _run_session(merge(bundle), data)}
    except Exception as error:  # noqa: BLE001  whatever it is, it should not happen
        outcome.trouble.append(f"does not run: {type(error).__name__}: {error}")
        return outcome
    for label, made in found.items():
        for name, array in expected.items():
            if name not in made:
                is_loss = drawn.loss == "from-model" and name == drawn.output
                if not is_loss and not any(f"'{name}'" in remark for remark in outcome.remarks):
                    outcome.trouble.append(f"{label} leave out {name} without a word")
                continue
            if any(r.startswith(CONTRADICTION) and f"'{name}'" in r for r in outcome.remarks):
                continue  # which of the two is right was not decided, and that was said
            if label == "the parts":  # single numbers get an entry for each batch
                array = np.atleast_1d(array)
            outcome.off[f"{label}: {name}"] = measure(made[name], array)
    if slopes and not outcome.wrong:
        _hold_slopes(drawn, expected, data, outcome)
    return outcome


def measure(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest expected value."""
    if found.shape != expected.shape:
        return float("inf")
    first, second = found.astype(np.float64), expected.astype(np.float64)
    if not np.array_equal(np.isfinite(first), np.isfinite(second)):
        return float("inf")
    with np.errstate(invalid="ignore"):
        gap = np.nan_to_num(np.abs(first - second), nan=0.0, posinf=0.0).max(initial=0.0)
    return float(gap / max(np.abs(second[np.isfinite(second)]).max(initial=0.0), 1e-6))


def _judge_remarks(
    outcome: Outcome, model: onnx.ModelProto, data: Arrays, expected: Arrays
) -> list[str]:
    """List the remarks without a reason.

    The evaluators may well contradict each other, for ONNX Runtime has mistakes of its own; then
    its plain session is off here, too.  Other remarks that may be right are taken as they are.
    """
    unfounded = []
    for remark in outcome.remarks:
        if remark.startswith(CONTRADICTION):
            session = _run_plainly(to_inference(model), data)
            off = [measure(session[name], array) for name, array in expected.items()]
            if max(off) <= outcome.allowed:
                unfounded.append(remark)
        elif not any(words in remark for words in FOUNDED):
            unfounded.append(remark)
    return unfounded


def _cut(drawn: Drawn, *, whole: bool = False, check: bool = True) -> Bundle:
    at = None
    if drawn.at is not None and not whole:
        candidates = inspect(drawn.model)
        if candidates:
            at = candidates[drawn.at % len(candidates)].tensor
    return cut(
        drawn.model,
        at=at,
        loss=drawn.loss,
        output=drawn.output,
        client_target=TARGETS[drawn.portable[0]],
        server_target=TARGETS[drawn.portable[1]],
        check=check,
    )


@contextmanager
def _noting(remarks: list[str]) -> Iterator[None]:
    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            remarks.append(record.getMessage())

    log, notes = logging.getLogger("splitonnx.partitioner"), Notes(logging.WARNING)
    log.addHandler(notes)
    try:
        yield
    finally:
        log.removeHandler(notes)


def _widen(data: Mapping[str, np.ndarray]) -> Arrays:
    return {n: a.astype(np.float64) if a.dtype.kind == "f" else a for n, a in data.items()}


def _evaluate(model: onnx.ModelProto, data: Mapping[str, np.ndarray]) -> Arrays:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        evaluator = make_evaluator(model)
        results = evaluator.run(None, dict(data))
    assert isinstance(results, list)
    return dict(zip(evaluator.output_names, map(np.asarray, results), strict=True))


def _find_noise(
    model: onnx.ModelProto, data: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> float:
    """Return how far float32 is from float64, by the smaller step of two evaluators."""
    single = _evaluate(to_inference(model), data)
    return max((measure(single[name], array) for name, array in expected.items()), default=0.0)


def _predict(bundle: Bundle, data: Mapping[str, np.ndarray]) -> Arrays:
    link = None
    if bundle.server is not None:
        link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, link, threads=1) as client:
        return dict(client.predict(data))


def _run_plainly(model: onnx.ModelProto, data: Arrays) -> Arrays:
    return _run_session(model.SerializeToString(), data, onnxruntime.GraphOptimizationLevel(0))


def _run_session(content: bytes, data: Arrays, level: Any = None) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if level is not None:
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(content, options)
    names = [output.name for output in session.get_outputs()]
    feeds = {value.name: data[value.name] for value in session.get_inputs()}
    return dict(zip(names, map(np.array, session.run(None, feeds)), strict=True))


def _hold_slopes(
    drawn: Drawn, expected: Mapping[str, np.ndarray], data: Arrays, outcome: Outcome
) -> None:
    """Hold loss and gradients of the whole model against differences in float64."""
    labels = np.random.default_rng(3).standard_normal(expected[drawn.output].shape)
    labels = labels.astype(np.float32)
    try:
        bundle = _cut(drawn, whole=True, check=False)
        feeds = data if drawn.loss == "from-model" else {**data, "labels": labels}
        step = run_step(bundle, feeds)
    except Exception as error:  # noqa: BLE001
        outcome.trouble.append(f"takes no step: {type(error).__name__}: {error}")
        return
    trained = [name[: -len("_grad")] for name in step if name.endswith("_grad")]
    double = to_double(drawn.model)
    weights = {t.name: numpy_helper.to_array(t).copy() for t in double.graph.initializer}
    trained = [name for name in trained if name in weights]
    for tensor in list(double.graph.initializer):
        if tensor.name in trained:
            double.graph.initializer.remove(tensor)
            double.graph.input.append(
                helper.make_tensor_value_info(tensor.name, TensorProto.DOUBLE, tensor.dims)
            )
    evaluator = make_evaluator(double)
    feeds = _widen(data) | {name: weights[name] for name in trained}
    position = evaluator.output_names.index(drawn.output)

    def find_loss() -> float:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            results = evaluator.run(None, feeds)
        assert isinstance(results, list)
        if drawn.loss == "from-model":
            return float(results[position])
        return LOSSES["mse"](results[position], labels.astype(np.float64))

    loss = find_loss()
    outcome.off["loss"] = abs(float(step["loss"]) - loss) / max(1.0, abs(loss))
    pairs = []
    for name in trained:
        close = differentiate_numerically(find_loss, feeds[name], entries=3)
        wide = differentiate_numerically(find_loss, feeds[name], entries=3, step=30 * STEP)
        for (index, slope), (_, other) in zip(close, wide, strict=True):
            if abs(slope - other) <= 1e-4 * max(1.0, abs(slope)):  # no kink in between
                pairs.append((f"{name}{list(index)}", float(step[f"{name}_grad"][index]), slope))
    largest = max([1e-3, *(abs(slope) for *_, slope in pairs)])
    outcome.slopes = len(pairs)
    for place, found, slope in pairs:
        if abs(found - slope) > SLOPE * largest:
            outcome.trouble.append(f"gradient of {place}: {found:.6g}, not {slope:.6g}")


def describe(drawn: Drawn) -> Sequence[str]:
    """Describe a model, one node a line."""
    model = drawn.model
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    lines = [
        f"opset {model.opset_import[0].version}, ir {model.ir_version}, cut {drawn.at}, loss "
        f"{drawn.loss} of {drawn.output}, portable {drawn.portable}"
    ]
    lines += [f"  {name}: {array.dtype}{list(array.shape)}" for name, array in constants.items()]
    for value in (*model.graph.input, *model.graph.output):
        tensor = value.type.tensor_type
        dims = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
        lines.append(f"  {value.name}: type {tensor.elem_type} {dims}")
    for node in model.graph.node:
        held = {
            a.name: numpy_helper.to_array(a.t).tolist()
            if a.HasField("t")
            else helper.get_attribute_value(a)
            for a in node.attribute
        }
        lines.append(
            f"  {node.op_type}({', '.join(node.input)}) -> {', '.join(node.output)} {held}"
        )
    return lines
