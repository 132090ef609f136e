"""Constants that may have been learned are told with their role, and the option trains them."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest

import splitonnx
from splitonnx.errors import UnsupportedModel
from splitonnx.manifests import Role
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.normalization.constants.kept import Kept, describe_kept
from splitonnx.partitioner.normalization.constants.numbers import Place
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.remarks import Kind, Remark
from tests.support.derivatives import close_net, draw_labels, hold_steps, take_step
from tests.support.nets import Net

Build = Callable[[Net, str], str]
DRAWN = np.random.default_rng(7)
X = DRAWN.standard_normal((2, 5, 8)).astype(np.float32)


def draw(*shape: int, around: float = 0.0) -> np.ndarray:
    return (around + 0.4 * DRAWN.standard_normal(shape)).astype(np.float32)


def put(net: Net, name: str, *numbers: int) -> str:
    return net.constant(name, np.array(numbers, np.int64))


def start_recurrence(net: Net, hidden: str, *, kind: str, gates: int) -> str:
    """Run a layer from a stored first state that is repeated for each sample."""
    turned = net.op("Transpose", hidden, out="turned", perm=[1, 0, 2])
    rows = net.op("Shape", "x", out="rows", start=0, end=1)
    size = net.op("Concat", put(net, "one", 1), rows, put(net, "four", 4), out="size", axis=0)
    states = [
        net.op("Expand", net.constant(name, draw(1, 1, 4)), size, out=f"{name}.all")
        for name in (("h0", "c0") if kind == "LSTM" else ("h0",))
    ]
    weights = [net.weight("W", 1, gates * 4, 8), net.weight("R", 1, gates * 4, 4)]
    net.op(kind, turned, *weights, "", "", *states, out="y5", hidden_size=4)
    return net.op("Squeeze", "y5", put(net, "second", 1), out="sequence")


def attend(net: Net, hidden: str, *shape: int) -> str:
    mask = net.constant("bias", draw(*shape))
    return net.op("Attention", hidden, hidden, hidden, mask, out="a", q_num_heads=2, kv_num_heads=2)


def attend_behind_prefix(net: Net, hidden: str) -> str:
    rows = net.op("Shape", "x", out="rows", start=0, end=1)
    size = net.op("Concat", rows, put(net, "rest", 2, 3, 4), out="size", axis=0)
    past = [
        net.op("Expand", net.constant(name, draw(1, 2, 3, 4)), size, out=f"{name}.all")
        for name in ("prefix_k", "prefix_v")
    ]
    inputs = [hidden, hidden, hidden, "", *past]
    return net.op("Attention", *inputs, out="a", q_num_heads=2, kv_num_heads=2)


def pool(net: Net, hidden: str, *shape: int) -> str:
    """Take a generalized mean over positions."""
    positive = net.op("Softplus", hidden, out="positive")
    power = net.op("Pow", positive, net.constant("gem.p", draw(*shape, around=3)), out="power")
    mean = net.op("ReduceMean", power, put(net, "axes", 1), out="mean")
    return net.op("Pow", mean, net.op("Reciprocal", "gem.p", out="inverse"), out="root")


def clip(net: Net, hidden: str) -> str:
    bounds = [
        net.constant("low", np.array(-0.2137, np.float32)),
        net.constant("alpha", np.array(0.4719, np.float32)),
    ]
    return net.op("Clip", hidden, *bounds, out="clipped")


def sample(net: Net, hidden: str) -> str:
    image = net.op("Unsqueeze", hidden, put(net, "axes", 1), out="image")
    rows = net.op("Shape", "x", out="rows", start=0, end=1)
    size = net.op("Concat", rows, put(net, "rest", 2, 3, 2), out="size", axis=0)
    grid = net.op("Expand", net.constant("flow", draw(1, 2, 3, 2)), size, out="grid")
    return net.op("GridSample", image, grid, out="sampled")


def pick(net: Net, hidden: str) -> str:
    best = net.op("ArgMax", "x", out="best", axis=2, keepdims=0)
    depth = net.constant("depth", np.array(8, np.int64))
    coded = net.op("OneHot", best, depth, net.constant("levels", draw(2)), out="coded")
    return net.op("Mul", hidden, coded, out="product")


def rotate(net: Net, hidden: str) -> str:
    split = net.op("Reshape", hidden, put(net, "heads", 0, 0, 2, 4), out="split")
    heads = net.op("Transpose", split, out="heads_first", perm=[0, 2, 1, 3])
    rows = net.op("Shape", "x", out="rows", start=0, end=1)
    size = net.op("Concat", rows, put(net, "rest", 5, 2), out="size", axis=0)
    tables = [
        net.op("Expand", net.constant(name, draw(1, 5, 2)), size, out=f"{name}.all")
        for name in ("cosines", "sines")
    ]
    return net.op("RotaryEmbedding", heads, *tables, out="rotated")


LEARNED: dict[str, tuple[Build, set[str], Place]] = {
    "GRU": (lambda n, h: start_recurrence(n, h, kind="GRU", gates=3), {"h0"}, Place.STATE),
    "LSTM": (lambda n, h: start_recurrence(n, h, kind="LSTM", gates=4), {"h0", "c0"}, Place.STATE),
    "RNN": (lambda n, h: start_recurrence(n, h, kind="RNN", gates=1), {"h0"}, Place.STATE),
    "a position bias": (lambda n, h: attend(n, h, 1, 2, 5, 5), {"bias"}, Place.MASK),
    "a prefix": (attend_behind_prefix, {"prefix_k", "prefix_v"}, Place.STATE),
    "one exponent": (lambda n, h: pool(n, h, 1), {"gem.p"}, Place.EXPONENT),
    "exponents": (lambda n, h: pool(n, h, 1, 8), {"gem.p"}, Place.EXPONENT),
    "a scalar exponent": (lambda n, h: pool(n, h), {"gem.p"}, Place.EXPONENT),
    "bounds": (clip, {"low", "alpha"}, Place.BOUND),
    "a flow": (sample, {"flow"}, Place.GRID),
    "levels": (pick, {"levels"}, Place.VALUES),
    "rotations": (rotate, {"cosines", "sines"}, Place.ROTATION),
}


def build(make: Build) -> onnx.ModelProto:
    net = Net(opset=23)
    hidden = net.op("MatMul", "x", net.weight("w", 8, 8), out="h")
    net.op("Identity", make(net, hidden), out="y")
    model = close_net(net, {"x": X})
    model.ir_version = 11
    return model


def list_told(model: onnx.ModelProto, *freeze: str) -> list[Remark]:
    remarks = check(model, loss="mse", freeze=freeze).remarks
    return [remark for remark in remarks if remark.kind is Kind.KEPT_CONSTANT]


@pytest.mark.parametrize(("make", "names", "place"), LEARNED.values(), ids=LEARNED)
def test_a_learned_tensor_in_the_role_of_a_constant_is_told_and_trained_by_the_option(
    make: Build, names: set[str], place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(make)
    (remark,) = list_told(model)
    assert set(remark.names) == names
    assert str(place) in remark.sentence
    option, pattern = shlex.split(remark.options[0])
    assert option == "--train"
    splitonnx.cut(model, at=None, loss="mse", check=False)
    assert f"--train '{pattern}'; --freeze '{pattern}' silences this" in caplog.text

    trained = prepare(open_model(model), train=[pattern])
    assert {trained.roles[name] for name in names} == {Role.PARAMETER}
    assert trained.kept_constants == ()
    hold_steps(
        take_step(model, {"x": X}, sorted(names)), model, "mse",
        {"x": X, "labels": draw_labels(model, {"x": X})}, sorted(names),
    )  # fmt: skip


@pytest.mark.parametrize("pattern", ["^h0$", "0"])
def test_freezing_the_constant_silences_the_remark(
    pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build(LEARNED["GRU"][0])
    assert list_told(model, pattern) == []
    splitonnx.cut(model, at=None, loss="mse", freeze=[pattern], check=False)
    assert "not trained" not in caplog.text
    with pytest.raises(UnsupportedModel, match="no parameter's name fits"):
        prepare(open_model(model), freeze=["^h1$"])


def test_freezing_a_single_number_silences_its_remark_too() -> None:
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w", 8, 8), out="h")
    net.op("Mul", hidden, net.constant("scale", np.array([1.3], np.float32)), out="y")
    model = close_net(net, {"x": X})
    assert prepare(open_model(model)).kept_numbers == ("scale",)
    assert prepare(open_model(model), freeze=["^scale$"]).kept_numbers == ()


USUAL: dict[str, Build] = {
    "a square": lambda n, h: n.op("Pow", h, n.constant("two", np.array(2, np.float32)), out="o"),
    "relu6": lambda n, h: n.op(
        "Clip",
        h,
        n.constant("z", np.array(0, np.float32)),
        n.constant("six", np.array(6, np.float32)),
        out="o",
    ),
    "a literal": lambda n, h: n.op(
        "Pow", h, n.constant("/m/Constant_output_0", np.array(1.7183, np.float32)), out="o"
    ),
    "a folded number": lambda n, h: n.op(
        "Clip", h, "", n.constant("val_3", np.array(4.6052, np.float32)), out="o"
    ),
}


@pytest.mark.parametrize("make", USUAL.values(), ids=USUAL)
def test_usual_constants_are_not_told(make: Build) -> None:
    assert list_told(build(make)) == []


def test_equal_numbers_are_told_under_the_name_of_a_parameter() -> None:
    def make(name: str) -> onnx.ModelProto:
        number = np.array([3], np.float32)
        return build(lambda n, h: n.op("Pow", h, n.constant(name, number), out="o"))

    assert [remark.names for remark in list_told(make("pool.p"))] == [("pool.p",)]
    assert list_told(make("p")) == []
    assert list_told(make("/pool/p.1/Constant_output_0")) == []


def test_several_constants_in_one_role_get_one_sentence() -> None:
    first = Kept(name="h0", node="n", operator="GRU", place=Place.STATE)
    others = [replace(first, name="p", place=place) for place in (Place.EXPONENT, Place.RANGE)]
    told = list(describe_kept([first, replace(first, name="h1"), *others]))
    assert [names for _, names in told] == [("h0", "h1"), ("p",), ("p",)]
    assert "are not trained, since GRU nodes read them as first states" in told[0][0]
    assert "is not trained, since GRU 'n' reads it as an exponent" in told[1][0]
    assert "reads it as an end of a range" in told[2][0]
