"""Update graphs against the definitions, written out in float64 numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from splitonnx.errors import UsageError
from splitonnx.manifests import LEARNING_RATE, STEP
from splitonnx.optimizers import (
    SGD,
    Adam,
    AdamW,
    Optimizer,
    ParameterGroup,
    assign_groups,
    describe_optimizer,
    read_optimizer,
)
from splitonnx.partitioner.differentiation.updates import Norms, build_norms, build_update
from splitonnx.tensors import TensorSpec

Arrays = dict[str, np.ndarray]
SHAPES = {"w": (3, 4), "b": (5,)}
SPECS = [TensorSpec(name=name, dtype="F32", shape=shape) for name, shape in SHAPES.items()]
GRADIENTS = {name: f"{name}_grad" for name in SHAPES}
STEPS = 6


def load(graph: ir.Graph) -> onnxruntime.InferenceSession:
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    return onnxruntime.InferenceSession(model.SerializeToString())


def run(session: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]) -> Arrays:
    wanted = [value.name for value in session.get_inputs()]
    results = session.run(None, {name: feeds[name] for name in wanted})
    return dict(zip([value.name for value in session.get_outputs()], results, strict=True))


def draw(seed: int) -> Arrays:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape) for name, shape in SHAPES.items()}


def sgd(optimizer: Optimizer, p: np.ndarray, g: np.ndarray, s: Arrays, lr: float, t: int) -> None:
    assert isinstance(optimizer, SGD)
    g = g + optimizer.weight_decay * p
    s["v"] = optimizer.momentum * s.get("v", np.zeros_like(p)) + g
    p -= lr * s["v"]


def adam(optimizer: Optimizer, p: np.ndarray, g: np.ndarray, s: Arrays, lr: float, t: int) -> None:
    assert isinstance(optimizer, Adam)
    if isinstance(optimizer, AdamW):
        p *= 1 - lr * optimizer.weight_decay
    else:
        g = g + optimizer.weight_decay * p
    s["m"] = optimizer.beta1 * s.get("m", 0) + (1 - optimizer.beta1) * g
    s["v"] = optimizer.beta2 * s.get("v", 0) + (1 - optimizer.beta2) * g * g
    mean, square = s["m"] / (1 - optimizer.beta1**t), s["v"] / (1 - optimizer.beta2**t)
    p -= lr * mean / (np.sqrt(square) + optimizer.eps)


Reference = Callable[[Optimizer, np.ndarray, np.ndarray, Arrays, float, int], None]


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "reference"),
    [
        (SGD(lr=0.1), sgd),
        (SGD(lr=0.1, momentum=0.9), sgd),
        (SGD(lr=0.1, momentum=0.5, weight_decay=0.1), sgd),
        (Adam(lr=0.01), adam),
        (Adam(lr=0.01, weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-4), adam),
        (AdamW(lr=0.01), adam),
        (AdamW(lr=0.01, weight_decay=0.3), adam),
        (AdamW(lr=0.01, weight_decay=0.0), adam),
    ],
)
def test_an_update_is_what_the_definition_says(
    optimizer: Optimizer, reference: Reference, portable: bool
) -> None:
    update = build_update(SPECS, GRADIENTS, optimizer, portable=portable)
    session = load(update.graph)
    expected, own = draw(0), {name: {} for name in SHAPES}  # type: Arrays, dict[str, Arrays]
    state: Arrays = {name: array.astype(np.float32) for name, array in expected.items()}
    for spec in update.state:
        state[spec.tensor.name] = np.zeros(SHAPES[spec.tensor.name.split("#")[0]], np.float32)
    for step in range(1, STEPS + 1):
        rate = optimizer.lr / step
        gradients = draw(step)
        feeds = {f"{name}_grad": g.astype(np.float32) for name, g in gradients.items()}
        feeds |= {LEARNING_RATE: np.array(rate, np.float32), STEP: np.array(step)}
        made = run(session, {**state, **feeds})
        state = {name: made[value] for name, value in update.commits.items()}
        for name, parameter in expected.items():
            reference(optimizer, parameter, gradients[name], own[name], rate, step)
            np.testing.assert_allclose(state[name], parameter, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("step", [1, 2, 3, 10, 100, 1000, 17_000, 1_000_000])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.99999), (0.0, 0.95)])
def test_portable_corrections_are_exact_at_every_step(
    step: int, betas: tuple[float, float]
) -> None:
    optimizer = Adam(beta1=betas[0], beta2=betas[1], eps=0.0)
    spec = TensorSpec(name="w", dtype="F32", shape=(1,))
    session = load(build_update([spec], GRADIENTS, optimizer, portable=True).graph)
    one, none = np.ones(1, np.float32), np.zeros(1, np.float32)
    made = run(
        session,
        {
            **{"w": none, "w_grad": one, "w#exp_avg": one, "w#exp_avg_sq": one},
            **{LEARNING_RATE: np.array(1, np.float32), STEP: np.array(step)},
        },
    )
    expected = -np.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)
    np.testing.assert_allclose(made["w#next"], expected, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "wanted"), [("F32", False), ("F64", True)])
def test_a_portable_update_takes_double_precision_for_double_parameters_alone(
    dtype: str, wanted: bool
) -> None:
    spec = TensorSpec(name="w", dtype=dtype, shape=(1,))
    graph = build_update([spec], GRADIENTS, AdamW(), portable=True).graph
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    inferred = onnx.shape_inference.infer_shapes(model)
    double = onnx.TensorProto.DOUBLE
    found = {value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    assert (double in found) is wanted


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_clipping_scales_by_the_global_norm_of_all_parties(scale: float) -> None:
    gradients = {name: (array * scale).astype(np.float32) for name, array in draw(1).items()}
    vectors: Arrays = {}
    for name in SHAPES:  # each parameter with a party of its own
        spec = next(spec for spec in SPECS if spec.name == name)
        norms = load(build_norms([spec], GRADIENTS, f"norms.{name}"))
        vectors |= run(norms, {f"{name}_grad": gradients[name]})
    whole = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
    factor = min(1.0, 0.5 / (whole + 1e-6))
    for spec in SPECS:
        update = build_update(
            [spec],
            GRADIENTS,
            SGD(lr=1.0, clip_norm=0.5),
            Norms(sizes={"norms.w": 1, "norms.b": 1}, order=[0, 1]),
        )
        zeros = np.zeros(SHAPES[spec.name], np.float32)
        feeds = {spec.name: zeros, f"{spec.name}_grad": gradients[spec.name], **vectors}
        made = run(load(update.graph), {**feeds, LEARNING_RATE: np.array(1, np.float32)})
        expected = -gradients[spec.name] * factor
        np.testing.assert_allclose(made[f"{spec.name}#next"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer",
    [
        SGD(lr=0.5, momentum=0.1),
        Adam(clip_norm=2.0),
        AdamW(lr=1e-4, eps=1e-6),
        AdamW(
            groups=(
                ParameterGroup(pattern="bias$", weight_decay=0),
                ParameterGroup(pattern="^head", lr_factor=10),
            )
        ),
    ],
)
def test_a_description_gives_the_same_optimizer_back(optimizer: Optimizer) -> None:
    assert read_optimizer(describe_optimizer(optimizer)) == optimizer


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        ({"name": "lion"}, "choose from sgd, adam, adamw"),
        ({"name": "adam", "momentum": 0.9}, "no setting 'momentum'"),
        ({"name": "sgd", "lr": -1.0}, "lr must be at least 0"),
        ({"name": "sgd", "momentum": 1.0}, "below 1"),
        ({"name": "adamw", "beta2": float("nan")}, "beta2"),
        ({"name": "adamw", "clip_norm": 0.0}, "clip_norm must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(
    description: dict[str, float | str | None], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        read_optimizer(description)


def test_a_setting_without_an_end_is_refused() -> None:
    for setting in ("lr", "weight_decay", "clip_norm"):
        with pytest.raises(UsageError, match=f"{setting} must be .* finite, not inf"):
            read_optimizer({"name": "sgd", setting: float("inf")})


def test_the_last_group_that_matches_a_parameter_applies() -> None:
    every = ParameterGroup(pattern=".", weight_decay=0.1)
    head = ParameterGroup(pattern="^head", lr_factor=10)
    names = ["head.weight", "body.weight"]
    assert assign_groups([every, head], names) == {"head.weight": head, "body.weight": every}
    assert assign_groups([head], names) == {"head.weight": head}
    assert assign_groups([], names) == {}


def test_a_group_without_a_parameter_is_refused_and_some_parameters_are_named() -> None:
    every, head = ParameterGroup(pattern="."), ParameterGroup(pattern="^head")
    with pytest.raises(UsageError, match=r"\^tail: it finds no parameter.*'head.weight', 'b'"):
        assign_groups([ParameterGroup(pattern="^tail")], ["head.weight", "b"])
    with pytest.raises(UsageError, match=r"\^head has no effect: later groups"):
        assign_groups([head, every], ["head.weight", "b"])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pattern": "("}, "'\\(' of a parameter group is not a regular expression"),
        ({"pattern": "a", "lr_factor": -1.0}, "lr_factor must be at least 0"),
        ({"pattern": "a", "weight_decay": float("nan")}, "weight_decay must be at least 0"),
        ({"pattern": "a", "momentum": 0.5}, "a parameter group has no setting 'momentum'"),
    ],
)
def test_settings_of_a_group_that_make_no_sense_are_refused(
    settings: dict[str, float | str | None], expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        read_optimizer({"name": "sgd", "groups": [settings]})
