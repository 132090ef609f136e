"""Recognise a Softmax or a Sigmoid that a model computes with other operators.

Some exporters write ``exp(x) / sum(exp(x))`` and ``1 / (1 + exp(-x))`` step by step.
Mathematically, these are the same activations as the operators Softmax and Sigmoid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from splitonnx.partitioner.graphs.builders import known_array

_LAYOUTS = frozenset({"Identity", "Reshape", "Unsqueeze"})
_BOUNDS = frozenset({"Add", "Clip", "Max"})
"""Operators that keep a denominator from becoming zero, if their other inputs are constants."""


@dataclass(frozen=True, kw_only=True)
class SpelledActivation:
    """An activation that several nodes compute together.

    ``source`` is the tensor to which the activation is applied, or ``None`` if no tensor holds it
    or the nodes compute the activation only approximately.  ``axes`` contains the axes of a
    Softmax, none of them negative.  ``inner`` contains the tensors between ``source`` and the
    result.
    """

    kind: str
    source: ir.Value | None
    axes: tuple[int, ...] = ()
    inner: tuple[ir.Value, ...] = ()


def find_spelled(value: ir.Value) -> SpelledActivation | None:
    """Return the activation that the nodes before ``value`` compute together, or ``None``."""
    for match in _MATCHES:
        found = match(value)
        if found is None:
            continue
        if found.source is None or not _has_shape_of(found.source, value):
            return SpelledActivation(kind=found.kind, source=None, axes=found.axes)
        inner = _list_between(value, found.source)
        return SpelledActivation(kind=found.kind, source=found.source, axes=found.axes, inner=inner)
    return None


def _match_quotient(value: ir.Value) -> SpelledActivation | None:
    """Match ``exp(x) / sum(exp(x))``, a Softmax, and ``exp(x) / (1 + exp(x))``, a Sigmoid."""
    for top, bottom in _list_quotients(value):
        exponent = _take(top, "Exp")
        if exponent is None:
            continue
        if _strip_constant(bottom, "Add", 1) is top:
            return SpelledActivation(kind="Sigmoid", source=exponent)
        total, is_exact = bottom, True
        while (inner := _strip_bound(total)) is not None:
            total, is_exact = inner, False
        axes = _find_summed_axes(_strip_zeros(total), top, "ReduceSum", "ReduceL1")
        if axes:
            source = exponent if is_exact else None
            return SpelledActivation(kind="Softmax", source=source, axes=axes)
    return None


def _match_normalization(value: ir.Value) -> SpelledActivation | None:
    """Match ``exp(x)`` divided by its L1 norm in one node, a Softmax."""
    powers = _take(value, "LpNormalization")
    exponent = None if powers is None else _take(powers, "Exp")
    node, rank = value.producer(), len(value.shape) if value.shape is not None else 0
    if exponent is None or node is None or not rank or node.attributes.get_int("p", 2) != 1:
        return None
    axis = node.attributes.get_int("axis", -1) % rank
    return SpelledActivation(kind="Softmax", source=exponent, axes=(axis,))


def _match_exponential(value: ir.Value) -> SpelledActivation | None:
    """Match ``exp`` of a LogSoftmax, and ``exp(x - log(sum(exp(x))))``."""
    logarithm = _take(value, "Exp")
    node = None if logarithm is None else logarithm.producer()
    if node is None or node.domain or not node.inputs or node.inputs[0] is None:
        return None
    scores = node.inputs[0]
    rank = len(value.shape) if value.shape is not None else 0
    if node.op_type == "LogSoftmax" and rank:
        axis = node.attributes.get_int("axis", -1) % rank
        return SpelledActivation(kind="Softmax", source=scores, axes=(axis,))
    if node.op_type != "Sub" or node.inputs[1] is None:
        return None
    axes = _find_summed_axes(node.inputs[1], scores, "ReduceLogSumExp")
    total = _take(node.inputs[1], "Log")
    if total is not None and not axes:
        axes = next(
            (
                found
                for use in scores.uses()
                if use.node.op_type == "Exp" and not use.node.domain
                and (found := _find_summed_axes(total, use.node.outputs[0], "ReduceSum"))
            ),
            (),
        )  # fmt: skip
    return SpelledActivation(kind="Softmax", source=scores, axes=axes) if axes else None


def _match_softplus(value: ir.Value) -> SpelledActivation | None:
    """Match ``exp(-softplus(-x))`` and ``exp(x - softplus(x))``, each a Sigmoid."""
    logarithm = _take(value, "Exp")
    if logarithm is None:
        return None
    rest = _find_negated(logarithm)
    negative = None if rest is None else _find_softplus(rest)
    if negative is not None:
        return SpelledActivation(kind="Sigmoid", source=_find_negated(negative))
    inputs = _take_all(logarithm, "Sub")
    if len(inputs) == 2 and _find_softplus(inputs[1]) is inputs[0]:
        return SpelledActivation(kind="Sigmoid", source=inputs[0])
    return None


def _match_logistic(value: ir.Value) -> SpelledActivation | None:
    """Match ``1 / (1 + exp(-x))``."""
    bottom = _find_inverted(value)
    power = None if bottom is None else _strip_constant(bottom, "Add", 1)
    negative = None if power is None else _take(power, "Exp")
    if negative is None:
        return None
    return SpelledActivation(kind="Sigmoid", source=_find_negated(negative))


def _match_tangent(value: ir.Value) -> SpelledActivation | None:
    """Match ``0.5 * (tanh(x / 2) + 1)``."""
    raised = _strip_half(value)
    curve = None if raised is None else _strip_constant(raised, "Add", 1)
    if curve is None:
        halved = _strip_constant(value, "Add", 0.5)
        curve = None if halved is None else _strip_half(halved)
    half = None if curve is None else _take(curve, "Tanh")
    return None if half is None else SpelledActivation(kind="Sigmoid", source=_strip_half(half))


_MATCHES: Sequence[Callable[[ir.Value], SpelledActivation | None]] = (
    _match_quotient,
    _match_normalization,
    _match_exponential,
    _match_softplus,
    _match_logistic,
    _match_tangent,
)


def _list_quotients(value: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """List numerator and denominator of a quotient, in each order that fits."""
    inputs = _take_all(value, "Div")
    if len(inputs) == 2:
        return [(inputs[0], inputs[1])]
    factors = _take_all(value, "Mul")
    pairs = [(factors[0], factors[1]), (factors[1], factors[0])] if len(factors) == 2 else []
    inverted = [(top, _find_inverted(factor)) for top, factor in pairs]
    return [(top, bottom) for top, bottom in inverted if bottom is not None]


def _find_inverted(value: ir.Value) -> ir.Value | None:
    """Return ``v`` if ``value`` is ``1 / v``."""
    if (bottom := _take(value, "Reciprocal")) is not None:
        return bottom
    inputs = _take_all(value, "Div")
    if len(inputs) == 2 and _is_number(inputs[0], 1):
        return inputs[1]
    inputs = _take_all(value, "Pow")
    return inputs[0] if len(inputs) == 2 and _is_number(inputs[1], -1) else None


def _find_softplus(value: ir.Value) -> ir.Value | None:
    """Return ``v`` if ``value`` is ``log(1 + exp(v))``, also as a rewrite spells it out.

    The rewrite is ``relu(v) + log(exp(-relu(v)) + exp(v - relu(v)))``.
    """
    if (source := _take(value, "Softplus")) is not None:
        return source
    total = _take(value, "Log")
    power = None if total is None else _strip_constant(total, "Add", 1)
    if power is not None:
        return _take(power, "Exp")
    terms = _take_all(value, "Add")
    positive, rest = terms if len(terms) == 2 else (None, None)
    source = None if positive is None else _take(positive, "Relu")
    total = None if rest is None else _take(rest, "Log")
    exponents = [_take(power, "Exp") for power in _take_all(total, "Add")] if total else []
    if source is None or len(exponents) != 2 or exponents[0] is None or exponents[1] is None:
        return None
    is_rewrite = _find_negated(exponents[0]) is positive
    return source if is_rewrite and _take_all(exponents[1], "Sub") == [source, positive] else None


def _find_negated(value: ir.Value) -> ir.Value | None:
    """Return ``v`` if ``value`` is ``-v``."""
    if (source := _take(value, "Neg")) is not None:
        return source
    inputs = _take_all(value, "Sub")
    if len(inputs) == 2 and _is_number(inputs[0], 0):
        return inputs[1]
    inputs = _take_all(value, "Div")
    if len(inputs) == 2 and _is_number(inputs[1], -1):
        return inputs[0]
    return _strip_constant(value, "Mul", -1)


def _strip_half(value: ir.Value) -> ir.Value | None:
    """Return ``v`` if ``value`` is ``v / 2``."""
    inputs = _take_all(value, "Div")
    if len(inputs) == 2 and _is_number(inputs[1], 2):
        return inputs[0]
    return _strip_constant(value, "Mul", 0.5)


def _strip_constant(value: ir.Value, kind: str, number: float) -> ir.Value | None:
    """Return the other operand of a sum or product of which one operand is ``number``."""
    inputs = _take_all(value, kind)
    if len(inputs) == 2:
        for own, other in (inputs, inputs[::-1]):
            if _is_number(other, number):
                return own
    return None


def _strip_bound(value: ir.Value) -> ir.Value | None:
    node = value.producer()
    inputs = _take_all(value, node.op_type) if node is not None else []
    open_inputs = [own for own in inputs if known_array(own) is None]
    is_bound = node is not None and node.op_type in _BOUNDS and len(inputs) > 1
    return open_inputs[0] if is_bound and len(open_inputs) == 1 else None


def _strip_zeros(value: ir.Value) -> ir.Value:
    """Return ``v`` if ``value`` is ``v`` with its zeros replaced, which a sum of powers lacks."""
    inputs = _take_all(value, "Where")
    compared = _take_all(inputs[0], "Equal") if len(inputs) == 3 else []
    has_zero = len(compared) == 2 and compared[0] is inputs[2] and _is_number(compared[1], 0)
    return inputs[2] if has_zero else value


def _find_summed_axes(total: ir.Value, terms: ir.Value, *kinds: str) -> tuple[int, ...]:
    """Return the axes over which ``total`` reduces ``terms``, or no axes if it does not.

    Their absolute values count as the terms themselves, since ``exp(x)`` is never negative.
    ``kinds`` names the operators that may reduce them.  ``total`` must have size 1 along these
    axes, or the size of ``terms`` after an Expand.
    """
    while (inner := _take_first(total, {"Expand", "Identity"})) is not None:
        total = inner
    sums = total
    while (inner := _take_first(sums, _LAYOUTS)) is not None:
        sums = inner
    node, summed = sums.producer(), _take_first(sums, {*kinds})
    if summed is not None and "ReduceLogSumExp" not in kinds:
        absolute = _take(summed, "Abs")
        summed = summed if absolute is None else absolute
    if terms.shape is None or summed is not terms or node is None:
        return ()
    axes = _read_axes(node, len(terms.shape))
    kept = [1 if axis in axes else dim for axis, dim in enumerate(terms.shape)]
    return axes if total.shape is not None and list(total.shape) == kept else ()


def _read_axes(node: ir.Node, rank: int) -> tuple[int, ...]:
    held = known_array(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = node.attributes.get_ints("axes", []) if held is None else held.reshape(-1).tolist()
    return tuple(sorted(int(axis) % rank for axis in axes))


def _take(value: ir.Value, kind: str) -> ir.Value | None:
    """Return the input of the node that computes ``value``, if its operator is ``kind``."""
    inputs = _take_all(value, kind)
    return inputs[0] if len(inputs) == 1 else None


def _take_first(value: ir.Value, kinds: set[str] | frozenset[str]) -> ir.Value | None:
    node = value.producer()
    inputs = _take_all(value, node.op_type) if node is not None and node.op_type in kinds else []
    return inputs[0] if inputs else None


def _take_all(value: ir.Value, kind: str) -> list[ir.Value]:
    node = value.producer()
    if node is None or node.domain or node.op_type != kind:
        return []
    return [own for own in node.inputs if own is not None]


def _is_number(value: ir.Value, number: float) -> bool:
    array = known_array(value)
    return array is not None and array.size > 0 and bool(np.all(array == number))


def _has_shape_of(one: ir.Value, other: ir.Value) -> bool:
    if one.shape is None or other.shape is None:
        return False
    return list(one.shape) == list(other.shape)


def _list_between(value: ir.Value, source: ir.Value) -> tuple[ir.Value, ...]:
    """List the tensors from which ``value`` is computed, back to ``source``."""
    found: dict[ir.Value, None] = {}
    following = [value]
    while following:
        node = following.pop().producer()
        for own in node.inputs if node is not None else ():
            if own is not None and own is not source and own not in found:
                found[own] = None
                following.append(own)
    return tuple(found)
