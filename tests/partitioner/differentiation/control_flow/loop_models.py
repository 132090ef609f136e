"""Small models with a Loop or an If, for :func:`scan_models.hold_gradients`.

A body reads ``a`` (2, 3) and the values ``x`` (4, 2, 3), ``w`` (3, 3), ``v`` (3, 3) and ``p`` (3)
around it.  The body of a Loop also reads the number ``i`` of the iteration.
"""

from __future__ import annotations

import onnx

_HEAD = """
<ir_version: 9, opset_import: ["" : 18]>
loops (
    float[N, 3] s, float[T, N, 3] x, float[3, 3] w, float[3, 3] v, float[3] p, int64 most, bool c
) => (float loss)
{
"""
_LOOP = """
    last, rows = Loop <
        body = step (int64 i, bool going, float[N, 3] a) =>
            (bool again, float[N, 3] n, float[N, 3] y) {{ {condition} {step} }}
    > ({most}, c, s)
    total = ReduceSumSquare <keepdims = 0> (last)
    bent = Tanh (rows)
    other = ReduceSum <keepdims = 0> (bent)
    loss = Add (total, other)
"""
_CARRYING = """
    zero = Constant <value_int = 0> ()
    last, second = Loop <
        body = step (int64 i, bool going, float[N, 3] a, INPUT) =>
            (bool again, float[N, 3] n, OUTPUT) { again = Identity (going)  STEP }
    > (most, c, s, FIRST)
    real = CastLike (second, s)
    part = Mul (last, real)
    loss = ReduceSumSquare <keepdims = 0> (part)
"""
_IF = """
    a = Tanh (s)
    y, z = If (c) <
        then_branch = one () => (float[N, 3] y1, float[N, 3] z1) {{ {then} }},
        else_branch = two () => (float[N, 3] y2, float[N, 3] z2) {{ {other} }}
    >
    total = ReduceSumSquare <keepdims = 0> (y)
    bent = Tanh (z)
    more = ReduceSum <keepdims = 0> (bent)
    loss = Add (total, more)
"""
GOES_ON = "again = Identity (going)"
STOPS = (
    "size = ReduceSumSquare <keepdims = 0> (n)  limit = Constant <value = float {2.0}> ()"
    "  again = Greater (size, limit)"
)


def write_loop(step: str, condition: str = GOES_ON, *, most: str = "most") -> onnx.ModelProto:
    """Write a model with a Loop of ``step``; ``most`` is what gives the most iterations."""
    before, after = (condition, step) if condition is GOES_ON else ("", f"{step} {condition}")
    return onnx.parser.parse_model(
        f"{_HEAD}{_LOOP.format(condition=before, step=after, most=most)}}}"
    )


def write_carrying(given: str, made: str, step: str, first: str) -> onnx.ModelProto:
    """Write a model with a Loop that carries a second value, which is ``first`` at its start."""
    words = {"INPUT": given, "OUTPUT": made, "STEP": step, "FIRST": first}
    text = _CARRYING
    for word, written in words.items():
        text = text.replace(word, written)
    return onnx.parser.parse_model(f"{_HEAD}{text}}}")


def write_if(then: str, other: str) -> onnx.ModelProto:
    """Write a model with an If of two branches, which make ``y1`` and ``z1``, ``y2`` and ``z2``."""
    return onnx.parser.parse_model(f"{_HEAD}{_IF.format(then=then, other=other)}}}")
