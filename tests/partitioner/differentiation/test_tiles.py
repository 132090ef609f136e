"""Large parameters are updated tile by tile, with the bits of an update as a whole."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from splitonnx.manifests import LEARNING_RATE, STEP
from splitonnx.optimizers import SGD, Adam, AdamW, Optimizer
from splitonnx.partitioner.differentiation import updates
from splitonnx.partitioner.differentiation.tiles import LARGEST, SMALLEST, choose_tile
from splitonnx.partitioner.differentiation.updates import Norms, Update, build_update
from splitonnx.tensors import TensorSpec

RATE = 0.05
SHAPES: dict[str, tuple[int, ...]] = {
    "dense": (600, 500),
    "pointwise": (640, 320, 1, 1),
    "small": (30, 40),
}
SPECS = [TensorSpec(name=name, dtype="F32", shape=shape) for name, shape in SHAPES.items()]
GRADIENTS = {name: f"{name}_grad" for name in SHAPES}
OPTIMIZERS = [
    AdamW(lr=RATE, weight_decay=0.1),
    AdamW(lr=RATE, weight_decay=0.0, clip_norm=0.5),
    Adam(lr=RATE, weight_decay=0.1, beta1=0.5),
]


def make_update(optimizer: Optimizer, *, portable: bool = False) -> Update:
    norms = None
    if optimizer.clip_norm is not None:
        norms = Norms(sizes={"norms": len(SPECS)}, order=range(len(SPECS)))
    return build_update(SPECS, GRADIENTS, optimizer, norms, portable=portable)


def draw() -> dict[str, np.ndarray]:
    """Draw parameters, gradients and moments of the third step."""
    random = np.random.default_rng(0)
    feeds: dict[str, np.ndarray] = {
        LEARNING_RATE: np.array(RATE, np.float32),
        STEP: np.array(3),
        "norms": np.full(len(SPECS), 4, np.float32),
    }
    for name, shape in SHAPES.items():
        for key in (name, GRADIENTS[name], f"{name}#exp_avg"):
            feeds[key] = random.standard_normal(shape).astype(np.float32)
        feeds[f"{name}#exp_avg_sq"] = random.uniform(0, 1, shape).astype(np.float32)
    return feeds


def run(update: Update, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(ir.Model(update.graph, ir_version=9)).SerializeToString()
    session = onnxruntime.InferenceSession(content, options)
    found = session.run(
        list(update.commits.values()), {i.name: feeds[i.name] for i in session.get_inputs()}
    )
    return dict(zip(update.commits, found, strict=True))


def count(update: Update, kind: str) -> int:
    return sum(node.op_type == kind for node in update.graph)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_tiles_have_the_bits_of_an_update_as_a_whole(
    optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds, tiled = draw(), make_update(optimizer)
    assert count(tiled, "Scan") == 2
    monkeypatch.setattr(updates, "choose_tile", lambda shape: None)
    whole = make_update(optimizer)
    assert count(whole, "Scan") == 0
    expected = run(whole, feeds)
    for name, array in run(tiled, feeds).items():
        assert array.shape == expected[name].shape
        assert array.tobytes() == expected[name].tobytes(), name


def test_an_update_in_tiles_follows_the_formula_of_adam_with_decoupled_decay() -> None:
    feeds = draw()
    found = run(make_update(OPTIMIZERS[0]), feeds)
    for name in SHAPES:
        p, g, m, v = (
            feeds[key].astype(np.float64)
            for key in (name, GRADIENTS[name], f"{name}#exp_avg", f"{name}#exp_avg_sq")
        )
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = m / (1 - 0.9**3) / (np.sqrt(v / (1 - 0.999**3)) + 1e-8)
        expected = p * (1 - RATE * 0.1) - RATE * step
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[f"{name}#exp_avg_sq"], v, rtol=1e-5)


def test_portable_updates_and_those_of_few_operators_are_not_tiled() -> None:
    assert count(make_update(AdamW(lr=RATE), portable=True), "Scan") == 0
    assert count(make_update(SGD(lr=RATE, momentum=0.9)), "Scan") == 0


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((4, 65536), LARGEST),
        ((1024, 3072), LARGEST),
        ((600, 500), 60000),
        ((1, 30000, 9), 54000),
        ((2, LARGEST), None),
        ((3, 5), None),
        ((131_101,), None),
        (("N", 65536, 4), None),
        ((), None),
    ],
)
def test_a_tile_divides_a_large_tensor(shape: tuple[int | str, ...], tile: int | None) -> None:
    assert choose_tile(shape) == tile
    assert tile is None or SMALLEST <= tile <= LARGEST
