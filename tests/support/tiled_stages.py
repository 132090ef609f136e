"""Updates loaded to run in tiles or whole, with values for their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from splitonnx.manifests import LEARNING_RATE, STEP
from splitonnx.optimizers import Optimizer
from splitonnx.partitioner.differentiation.updates import NEXT, Norms, build_update
from splitonnx.runtime.engine.engines import Engine, LoadedStage
from splitonnx.runtime.engine.tiles import regions, sessions
from splitonnx.runtime.engine.tiles.sessions import TiledSession
from splitonnx.tensors import TensorSpec

LARGE = (regions.SMALLEST // 4, 4)
"""The shape of a tensor that is just large enough for tiles."""
RATE = 0.05
NORMS = {"mine": 4, "theirs": 3}
SPECS = [
    TensorSpec(name=name, dtype=dtype, shape=shape)
    for name, dtype, shape in (
        ("matrix", "F32", (25, 41)),
        ("twin", "F32", (41, 25)),
        ("pointwise", "F32", (70, 5, 1, 1)),
        ("bias", "F32", (41,)),
        ("scalar", "F32", ()),
        ("empty", "F32", (0, 3)),
        ("double", "F64", (25, 41)),
    )
]
GRADIENTS = {spec.name: f"{spec.name}_grad" for spec in SPECS}
SMALL: dict[str, tuple[int, ...]] = {"row": (4,), "one": (1,), "deep": (1, 1, 1)}
Arrays = dict[str, np.ndarray]


@contextmanager
def sized(smallest: int, tile: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "SMALLEST", smallest)
        patch.setattr(sessions, "TILE", tile)
        yield


def write_update(optimizer: Optimizer, *, portable: bool = False) -> bytes:
    norms = Norms(sizes=NORMS, order=range(7)) if optimizer.clip_norm is not None else None
    made = build_update(SPECS, GRADIENTS, optimizer, norms, portable=portable)
    return bytes(ir.to_proto(ir.Model(made.graph, ir_version=9)).SerializeToString())


def draw(content: bytes, seed: int = 0) -> Arrays:
    """Draw values for all inputs of an update; squares are not negative."""
    random = np.random.default_rng(seed)
    feeds: Arrays = {}
    for value in ir.from_proto(onnx.load_from_string(content)).graph.inputs:
        assert value.name is not None
        assert value.shape is not None
        assert value.dtype is not None
        array = random.standard_normal(value.shape.numpy()).astype(value.dtype.numpy())
        is_square = value.name.endswith("_sq") or value.name in NORMS
        feeds[value.name] = np.abs(array) if is_square else array
    feeds[LEARNING_RATE] = np.array(RATE, np.float32)
    return {name: np.array(3) if name == STEP else array for name, array in feeds.items()}


def fill() -> Arrays:
    """Fill the inputs of a graph of ``write_graph`` with ones."""
    feeds = {name: np.ones(shape, np.float32) for name, shape in SMALL.items()}
    feeds |= {"x": np.ones(LARGE, np.float32), "w": np.ones(LARGE, np.float32)}
    return feeds | {"rate": np.array(RATE, np.float32)}


def run(engine: Engine, stage: LoadedStage, feeds: Mapping[str, np.ndarray]) -> Arrays:
    tensors = {name: engine.from_array(array) for name, array in feeds.items()}
    return {n: engine.to_array(t) for n, t in engine.run(stage, tensors).items()}


def train(engine: Engine, stage: LoadedStage, feeds: Arrays, steps: int) -> Arrays:
    """Make several updates with the same gradients, each of the state that the last one left."""
    outputs: Arrays = {}
    for number in range(1, steps + 1):
        outputs = run(engine, stage, feeds)
        feeds = feeds | {name.removesuffix(NEXT): array for name, array in outputs.items()}
        feeds |= {STEP: np.array(number + 1)} if STEP in feeds else {}
    return outputs


def load_tiled(
    content: bytes, *, training: bool = True, threads: int = 1, tile: int = 64
) -> tuple[Engine, LoadedStage]:
    engine = Engine(threads=threads)
    with sized(100, tile):
        stage = engine.load("update", content, training=training)
    assert isinstance(stage.session, TiledSession)
    return engine, stage


def load_whole(content: bytes, *, training: bool = True) -> tuple[Engine, LoadedStage]:
    engine = Engine(threads=1)
    with sized(1 << 60, 1 << 60):
        stage = engine.load("update", content, training=training)
    assert not isinstance(stage.session, TiledSession)
    return engine, stage


def assert_same_bits(found: Arrays, expected: Arrays) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name
