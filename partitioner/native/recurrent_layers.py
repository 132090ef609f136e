"""Implement LSTM, GRU and RNN for onnx's reference evaluator.

onnx's own classes ignore the lengths of sequences, most activation functions, ``clip`` and
``input_forget``, and refuse some directions.  The formulas here are those of LSTM-22, GRU-22 and
RNN-22 at onnx.ai/onnx/operators, and know nothing of how splitonnx rewrites these operators.  Where
the definitions leave details open, ONNX Runtime's kernels decide: ``clip`` limits the inputs of
gates but not the cell state, ``alpha`` and ``beta`` belong, in order, to the functions that use
them, and the defaults are ONNX Runtime's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

Function = Callable[[np.ndarray], np.ndarray]

_PLAIN: Mapping[str, Function] = {
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(0, x),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "tanh": np.tanh,
}
_SET: Mapping[str, tuple[tuple[float, ...], Callable[..., np.ndarray]]] = {
    "affine": ((0.0, 0.0), lambda x, alpha, beta: alpha * x + beta),
    "elu": ((1.0,), lambda x, alpha: np.where(x >= 0, x, alpha * np.expm1(np.minimum(x, 0)))),
    "hardsigmoid": ((0.2, 0.5), lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1)),
    "leakyrelu": ((0.01,), lambda x, alpha: np.where(x >= 0, x, alpha * x)),
    "scaledtanh": ((0.0, 0.0), lambda x, alpha, beta: alpha * np.tanh(beta * x)),
    "thresholdedrelu": ((0.0,), lambda x, alpha: np.where(x > alpha, x, 0)),
}
"""Functions with an alpha, or an alpha and a beta, and the defaults of these."""


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """The weights of one direction: W, R, the two halves of B, and P."""

    w: np.ndarray
    r: np.ndarray
    wb: np.ndarray
    rb: np.ndarray
    p: np.ndarray


class _Recurrence(OpRun):
    """A recurrent operator; its classes compute one step of one direction.

    ``gates`` is the number of gates, ``states`` that of states, and ``defaults`` are the activation
    functions of a direction.
    """

    op_domain = ""
    gates: int
    states: int
    defaults: Sequence[str]

    @abstractmethod
    def _step(
        self,
        x: np.ndarray,
        states: Sequence[np.ndarray],
        weights: _Weights,
        functions: Sequence[Function],
        attributes: Mapping[str, Any],
    ) -> Sequence[np.ndarray]:
        """Compute the next states of some rows of a batch, the hidden state first."""

    def _run(self, *inputs: np.ndarray | None, **attributes: Any) -> tuple[np.ndarray, ...]:
        x, w, r, b, lengths, *others = [*inputs, *[None] * 8][:8]
        assert x is not None
        assert w is not None
        assert r is not None
        turned = bool(attributes.get("layout"))
        steps = x.swapaxes(0, 1) if turned else x
        count, hidden, batch = len(w), r.shape[2], steps.shape[1]
        size = self.gates * hidden
        if w.shape != (count, size, steps.shape[2]) or r.shape != (count, size, hidden):
            raise RuntimeError(f"weights of {w.shape} and {r.shape} do not fit data of {x.shape}")
        lengths = _read_lengths(lengths, len(steps), batch)
        biases = np.zeros((count, 2 * size)) if b is None else b
        peepholes = others[2] if self.states > 1 and others[2] is not None else None
        starts = [_read_state(v, (count, batch, hidden), turned) for v in others[: self.states]]
        functions = list(_read_functions(attributes, self.defaults, count))
        own_count = len(self.defaults)
        rows = np.zeros((len(steps), count, batch, hidden))
        for index in range(count):
            halves = np.split(biases[index].astype(np.float64), 2)
            weights = _Weights(
                w=w[index].astype(np.float64),
                r=r[index].astype(np.float64),
                wb=halves[0],
                rb=halves[1],
                p=np.zeros(3 * hidden) if peepholes is None else peepholes[index],
            )
            own = functions[index * own_count : (index + 1) * own_count]
            backwards = index == 1 or attributes.get("direction") == "reverse"
            for number in range(lengths.max(initial=0)):
                going = np.flatnonzero(number < lengths)
                times = lengths[going] - 1 - number if backwards else np.full(len(going), number)
                given = steps[times, going].astype(np.float64)
                states = [start[index, going] for start in starts]
                made = self._step(given, states, weights, own, attributes)
                rows[times, index, going] = made[0]
                for start, new in zip(starts, made, strict=True):
                    start[index, going] = new
        if turned:
            rows = rows.transpose(2, 0, 1, 3)
            starts = [start.swapaxes(0, 1) for start in starts]
        outputs = [array.astype(x.dtype) for array in (rows, *starts)]
        return tuple(outputs[: len(self.onnx_node.output)])


def _read_lengths(lengths: np.ndarray | None, steps: int, batch: int) -> np.ndarray:
    """Return the length of each sequence.

    Raises:
        RuntimeError: a length is not between 1 and ``steps``.  The standard does not define what an
            empty sequence gives.
    """
    if lengths is None:
        return np.full(batch, steps)
    if lengths.shape != (batch,) or (lengths < 1).any() or (lengths > steps).any():
        raise RuntimeError(f"sequence_lens are not {batch} numbers from 1 to {steps}")
    return lengths.astype(np.int64)


def _read_state(value: np.ndarray | None, shape: Sequence[int], turned: bool) -> np.ndarray:
    if value is None:
        return np.zeros(shape)
    return np.array(value.swapaxes(0, 1) if turned else value, np.float64)


def _read_functions(
    attributes: Mapping[str, Any], defaults: Sequence[str], count: int
) -> Iterator[Function]:
    """Yield the activation functions of ``count`` directions, the forward one first."""
    sources = [iter(attributes.get(f"activation_{n}") or ()) for n in ("alpha", "beta")]
    for name in attributes.get("activations") or [*defaults] * count:
        kind = name.lower()
        if kind in _PLAIN:
            yield _PLAIN[kind]
            continue
        usual, function = _SET[kind]
        pairs = zip(usual, sources, strict=False)
        yield _fix(function, [next(source, default) for default, source in pairs])


def _fix(function: Callable[..., np.ndarray], settings: Sequence[float]) -> Function:
    return lambda x: function(x, *settings)


def _clip(x: np.ndarray, attributes: Mapping[str, Any]) -> np.ndarray:
    most = attributes.get("clip") or np.inf
    limited: np.ndarray = np.clip(x, -most, most)
    return limited


class RNN(_Recurrence):
    """Compute RNN: H' = f(X W^T + H R^T + Wb + Rb)."""

    gates, states, defaults = 1, 1, ("Tanh",)

    def _step(
        self,
        x: np.ndarray,
        states: Sequence[np.ndarray],
        weights: _Weights,
        functions: Sequence[Function],
        attributes: Mapping[str, Any],
    ) -> Sequence[np.ndarray]:
        total = x @ weights.w.T + states[0] @ weights.r.T + weights.wb + weights.rb
        return [functions[0](_clip(total, attributes))]


class GRU(_Recurrence):
    """Compute GRU: H' = (1 - z) h + z H, with the gates in the order z, r, h."""

    gates, states, defaults = 3, 1, ("Sigmoid", "Tanh")

    def _step(
        self,
        x: np.ndarray,
        states: Sequence[np.ndarray],
        weights: _Weights,
        functions: Sequence[Function],
        attributes: Mapping[str, Any],
    ) -> Sequence[np.ndarray]:
        (before,) = states
        f, g = functions
        wz, wr, wh = np.split(x @ weights.w.T + weights.wb, 3, 1)
        rz, rr, rh = np.split(weights.r, 3)
        bz, br, bh = np.split(weights.rb, 3)
        z = f(_clip(wz + before @ rz.T + bz, attributes))
        r = f(_clip(wr + before @ rr.T + br, attributes))
        if attributes.get("linear_before_reset"):
            mixed = r * (before @ rh.T + bh)
        else:
            mixed = (r * before) @ rh.T + bh
        h = g(_clip(wh + mixed, attributes))
        return [(1 - z) * h + z * before]


class LSTM(_Recurrence):
    """Compute LSTM: C' = f C + i c and H' = o h(C'), with the gates in the order i, o, f, c."""

    gates, states, defaults = 4, 2, ("Sigmoid", "Tanh", "Tanh")

    def _step(
        self,
        x: np.ndarray,
        states: Sequence[np.ndarray],
        weights: _Weights,
        functions: Sequence[Function],
        attributes: Mapping[str, Any],
    ) -> Sequence[np.ndarray]:
        before, cell = states
        f, g, h = functions
        total = x @ weights.w.T + before @ weights.r.T + weights.wb + weights.rb
        entering, leaving, keeping, new = np.split(total, 4, 1)
        p_in, p_out, p_keep = np.split(weights.p, 3)
        i = f(_clip(entering + p_in * cell, attributes))
        if attributes.get("input_forget"):
            kept = 1 - i
        else:
            kept = f(_clip(keeping + p_keep * cell, attributes))
        after = kept * cell + i * g(_clip(new, attributes))
        o = f(_clip(leaving + p_out * after, attributes))
        return [o * h(after), after]


RECURRENT_LAYERS: tuple[type[OpRun], ...] = (GRU, LSTM, RNN)
"""The classes that the evaluator uses instead of its own."""
