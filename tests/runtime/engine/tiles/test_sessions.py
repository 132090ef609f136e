"""Stages over tiles give the bits of stages run whole, and keep the promises of all stages."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from splitonnx.errors import StageFailed, StageStopped
from splitonnx.manifests import LEARNING_RATE
from splitonnx.optimizers import SGD, Adam, AdamW, Optimizer, ParameterGroup
from splitonnx.partitioner.differentiation.updates import NEXT
from splitonnx.runtime.engine.engines import Engine, LoadedStage, Tensor
from splitonnx.runtime.engine.tiles import regions, sessions
from tests.runtime.engine.tiles.test_regions import STEP as STEPS
from tests.runtime.engine.tiles.test_regions import node, write_graph
from tests.support.tiled_stages import (
    LARGE,
    RATE,
    Arrays,
    assert_same_bits,
    draw,
    fill,
    load_tiled,
    load_whole,
    run,
    sized,
    train,
    write_update,
)

GROUPS = [
    ParameterGroup(pattern="matrix", lr_factor=0.5),
    ParameterGroup(pattern="twin", weight_decay=0.0),
]
OPTIMIZERS = [
    SGD(lr=RATE),
    SGD(lr=RATE, momentum=0.9, weight_decay=0.1, clip_norm=1.0),
    SGD(lr=RATE, groups=GROUPS),
    Adam(lr=RATE, weight_decay=0.1, clip_norm=0.1),
    AdamW(lr=RATE),
    AdamW(lr=RATE, weight_decay=0.3, groups=GROUPS, clip_norm=1e6),
    AdamW(lr=RATE, beta1=0.0),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_every_optimizer_gives_the_same_bits_in_tiles(
    optimizer: Optimizer, training: bool, threads: int
) -> None:
    content = write_update(optimizer, portable=not training)
    tiled = load_tiled(content, training=training, threads=threads)
    whole = load_whole(content, training=training)
    assert [part.region.shape for part in tiled[1].session._parts] == [
        (25, 41), (41, 25), (70, 5, 1, 1)
    ]  # fmt: skip
    feeds = draw(content)
    assert_same_bits(train(*tiled, feeds, 3), train(*whole, feeds, 3))


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_tiles_give_what_the_reference_evaluator_gives(optimizer: Optimizer) -> None:
    content = write_update(optimizer)
    engine, stage = load_tiled(content)
    feeds = draw(content)
    expected = ReferenceEvaluator(content).run(None, feeds)
    found = run(engine, stage, feeds)
    for (name, array), right in zip(found.items(), expected, strict=True):
        np.testing.assert_allclose(array, np.asarray(right), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("threads", [1, 2])
def test_large_tensors_run_in_tiles_without_being_told(threads: int) -> None:
    content = write_graph(*STEPS)
    engine = Engine(threads=threads)
    stage = engine.load("update", content, training=True)
    assert len(stage.session._tiles) > 1
    random = np.random.default_rng(0)
    x, w = (random.standard_normal(LARGE, np.float32) for _ in range(2))
    feeds = fill() | {"x": x, "w": w}
    np.testing.assert_array_equal(run(engine, stage, feeds)["y"], w - x * np.float32(RATE))


@pytest.mark.parametrize("size", [1, 15, 16, 17, 64, 1025, 10_000])
def test_tiles_cover_each_element_once(size: int) -> None:
    """Each tile but the last has a size that is a multiple of a line of the cache."""
    content = write_graph(*STEPS)
    for tile in (16, 48, 64):
        _, stage = load_tiled(content, tile=tile)
        (part,) = stage.session._parts
        resized = regions.Region(**{**vars(part.region), "shape": (size,)})
        with sized(100, tile):
            found = list(sessions._divide(sessions._Part(index=0, region=resized, session=None)))
        assert [start for _, start, _ in found] == [0, *(stop for _, _, stop in found[:-1])]
        assert found[-1][2] == size
        assert {(stop - start) % 16 for _, start, stop in found[:-1]} <= {0}
        assert max(stop - start for _, start, stop in found) <= tile


def test_equal_updates_share_a_session() -> None:
    opened: list[bytes] = []
    engine = Engine(threads=1)
    inner = engine._open

    def count(name: str, make_options: Any, graph: bytes, threads: int | None = None) -> Any:
        opened.append(graph)
        return inner(name, make_options, graph, threads)

    engine._open = count  # type: ignore[method-assign]
    with sized(100, 64):
        stage = engine.load("update", write_update(AdamW(lr=RATE)), training=True)
    assert len({id(part.session) for part in stage.session._parts}) == 1
    assert len(opened) == 2  # that one, and the rest


def test_the_old_state_stays_as_it_is() -> None:
    content = write_update(AdamW(lr=RATE))
    engine, stage = load_tiled(content)
    feeds = draw(content)
    before = {name: array.tobytes() for name, array in feeds.items()}
    train(engine, stage, feeds, 3)
    assert {name: array.tobytes() for name, array in feeds.items()} == before


def test_results_that_are_kept_are_not_overwritten_by_later_updates() -> None:
    content = write_update(SGD(lr=RATE, momentum=0.9))
    engine, stage = load_tiled(content)
    kept = run(engine, stage, draw(content))
    before = {name: array.tobytes() for name, array in kept.items()}
    for seed in range(1, 5):
        run(engine, stage, draw(content, seed))
    assert {name: array.tobytes() for name, array in kept.items()} == before


def test_results_outlive_their_stage() -> None:
    content = write_graph(*STEPS)
    engine, stage = load_tiled(content)
    feeds = fill() | {"w": np.full(LARGE, 3, np.float32), "rate": np.array(2, np.float32)}
    found = run(engine, stage, feeds)["y"]
    del engine, stage
    gc.collect()
    assert (found == 1).all()


def test_the_memory_of_a_state_is_used_again_when_it_is_gone() -> None:
    content = write_update(SGD(lr=RATE, momentum=0.9))
    engine, stage = load_tiled(content)
    feeds = {name: engine.from_array(array) for name, array in draw(content).items()}
    places = set()
    for _ in range(6):
        outputs = engine.run(stage, feeds)
        feeds |= {name.removesuffix(NEXT): tensor for name, tensor in outputs.items()}
        places.add(outputs["matrix" + NEXT].__array_interface__["data"][0])
        del outputs
    # the new state and the old one; two parameters and their momenta have the same size
    assert len(places) <= 8


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"matrix": np.ones((25, 40), np.float32)}, r"'matrix' has the shape \[25, 40\] instead"),
        ({"matrix": np.ones((41, 25), np.float32)}, r"\[41, 25\] instead of \[25, 41\]"),
        ({"twin_grad": np.ones((41, 25))}, "'twin_grad' is a tensor.double. instead"),
        ({"matrix": None}, "'matrix' is missing"),
        ({LEARNING_RATE: np.ones(2, np.float32)}, "a dimension other than 1"),
        ({LEARNING_RATE: None}, "learning_rate"),
        ({"bias": np.ones(40, np.float32)}, "bias"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_their_memory_is_read(
    change: dict[str, np.ndarray | None], reason: str
) -> None:
    content = write_update(SGD(lr=RATE))
    engine, stage = load_tiled(content)
    changed = {**draw(content), **change}
    feeds = {name: array for name, array in changed.items() if array is not None}
    with pytest.raises(StageFailed, match=f"^stage 'update' failed: .*{reason}"):
        run(engine, stage, feeds)


def test_a_number_that_is_an_input_is_checked_where_nothing_else_runs() -> None:
    engine, stage = load_tiled(write_graph(*STEPS))
    assert stage.session._rest is None
    feeds = {"x": np.ones(LARGE, np.float32), "w": np.ones(LARGE, np.float32)}
    for number in (np.ones(2, np.float32), np.array(1.0)):
        with pytest.raises(StageFailed, match=r"'rate' has the shape .* instead of one element"):
            run(engine, stage, {**feeds, "rate": number})
    with pytest.raises(StageFailed, match="'rate' is missing"):
        run(engine, stage, feeds)


class Interfering:
    """A program's session in which something happens before its second tile."""

    def __init__(self, session: Any, act: Any) -> None:
        self.tiles = 0
        self._session = session
        self._act = act

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.tiles += 1
        if self.tiles == 2:
            self._act()
        self._session.run_with_iobinding(binding, options)


def interfere(stage: LoadedStage, act: Any) -> Interfering:
    session = stage.session
    double = Interfering(session._parts[0].session, act)
    (part,) = session._parts
    changed = sessions._Part(index=0, region=part.region, session=double)
    session._parts = [changed]
    session._tiles = [(changed, start, stop) for _, start, stop in session._tiles]
    return double


def list_workers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "splitonnx-tiles"]


@pytest.mark.parametrize("threads", [1, 4])
def test_a_stage_that_is_stopped_ends_between_tiles(threads: int) -> None:
    engine, stage = load_tiled(write_graph(*STEPS), threads=threads, tile=1024)
    double = interfere(stage, engine.stop)
    with pytest.raises(StageStopped):
        run(engine, stage, fill())
    assert double.tiles <= 2 + threads
    assert not list_workers()


def test_where_no_thread_can_be_started_the_calling_one_does_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    content = write_update(AdamW(lr=RATE))
    engine, stage = load_tiled(content, threads=4)
    expected = run(*load_whole(content), draw(content))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert_same_bits(run(engine, stage, draw(content)), expected)


@pytest.mark.parametrize("arena", [True, False])
def test_memory_is_kept_where_the_engine_has_an_arena(arena: bool) -> None:
    content = write_update(SGD(lr=RATE))
    engine = Engine(threads=1, arena=arena)
    with sized(100, 64):
        stage = engine.load("update", content, training=True)
    run(engine, stage, draw(content))
    kept = [len(free) for free in stage.session._pool._free.values()]
    assert sum(kept) == (3 if arena else 0)


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_in_a_tile_ends_all_threads_and_names_the_stage(threads: int) -> None:
    def fail() -> None:
        raise RuntimeError("no more")

    engine, stage = load_tiled(write_graph(*STEPS), threads=threads, tile=1024)
    double = interfere(stage, fail)
    with pytest.raises(StageFailed, match=r"^stage 'update' failed: no more"):
        run(engine, stage, fill())
    assert double.tiles <= 2 + threads
    assert not list_workers()


def test_ctrl_c_between_tiles_ends_all_threads() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    engine, stage = load_tiled(write_graph(*STEPS), tile=1024)
    interfere(stage, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(engine, stage, fill())
    assert not list_workers()


@pytest.mark.parametrize("threads", [1, 3])
def test_denormals_are_flushed_in_tiles_as_elsewhere(threads: int) -> None:
    content = write_graph(node("Mul", "x rate", "a"), node("Mul", "a w", "y"))
    tiled, whole = load_tiled(content, threads=threads, tile=1024), load_whole(content)
    feeds = fill() | {"w": np.full(LARGE, 1e-38, np.float32)}
    found = run(*tiled, feeds)
    assert_same_bits(found, run(*whole, feeds))
    assert not found["y"].view(np.uint32).any()


def test_values_that_are_not_finite_go_the_same_way() -> None:
    content = write_update(AdamW(lr=RATE))
    feeds = draw(content)
    odd = [np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, 1e-45]
    feeds["matrix_grad"].flat[: 3 * len(odd)] = odd * 3
    feeds["matrix#exp_avg_sq"].flat[-len(odd) :] = odd
    assert_same_bits(run(*load_tiled(content), feeds), run(*load_whole(content), feeds))


def test_stages_of_several_threads_share_a_session() -> None:
    content = write_update(AdamW(lr=RATE))
    engine, stage = load_tiled(content, threads=2)
    whole = load_whole(content)
    expected = [run(*whole, draw(content, seed)) for seed in range(4)]
    found: dict[int, list[Arrays]] = {}

    def work(seed: int) -> None:
        found[seed] = [run(engine, stage, draw(content, seed)) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, right in enumerate(expected):
        for made in found[seed]:
            assert_same_bits(made, right)


ADDING = [node("Mul", "x rate", "change"), node("Add", "w change", "y")]
ODD = [np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38, 1e-45, -1e-45, -1e-38]


def load_adding(threads: int = 1) -> tuple[Engine, LoadedStage]:
    engine = Engine(threads=threads)
    with sized(100, 1024):
        stage = engine.load("accumulate", write_graph(*ADDING), training=True, sums={"w": "y"})
    return engine, stage


def draw_terms(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    terms = [random.standard_normal(LARGE, np.float32) for _ in range(count)]
    for term in terms:
        term.flat[: len(ODD)] = term.flat[-len(ODD) :] = random.permutation(ODD)
        term.flat[len(ODD)] = -0.0  # always, so that the sum shows what it began with
    return terms


@pytest.mark.parametrize("threads", [1, 3])
def test_a_sum_grows_where_it_is_with_the_bits_of_one_that_began_with_zeros(threads: int) -> None:
    engine, stage = load_adding(threads)
    assert stage.zeros == {"w"}
    whole = load_whole(write_graph(*ADDING))
    expected, found, feeds = np.zeros(LARGE, np.float32), None, fill()
    for term in draw_terms(4):
        feeds = {**feeds, "x": term}
        expected = run(*whole, {**feeds, "w": expected})["y"]
        tensors = {name: engine.from_array(a) for name, a in feeds.items() if name != "w"}
        place = None if found is None else found.__array_interface__["data"][0]
        found = engine.run(stage, tensors | ({} if found is None else {"w": found}))["y"]
        assert place in (None, found.__array_interface__["data"][0])
        assert engine.to_array(found).tobytes() == expected.tobytes()
        np.testing.assert_array_equal(engine.to_array(tensors["x"]), term)
    assert not np.signbit(expected.flat[len(ODD)])


def test_sums_of_two_sessions_of_the_same_stage_do_not_mix() -> None:
    engine, stage = load_adding()
    feeds = {name: engine.from_array(a) for name, a in fill().items() if name != "w"}
    sums: list[Tensor] = [engine.run(stage, feeds)["y"] for _ in range(2)]
    sums[1] = engine.run(stage, {**feeds, "w": sums[1]})["y"]
    once = np.full(LARGE, RATE, np.float32)
    np.testing.assert_array_equal(engine.to_array(sums[0]), once)
    np.testing.assert_array_equal(engine.to_array(sums[1]), once + once)


def test_a_sum_outlives_the_stage_and_its_earlier_versions() -> None:
    engine, stage = load_adding()
    feeds = {name: engine.from_array(a) for name, a in fill().items() if name != "w"}
    tensor = engine.run(stage, feeds)["y"]
    tensor = engine.run(stage, {**feeds, "w": tensor})["y"]
    found = engine.to_array(tensor)
    del engine, stage, feeds, tensor
    gc.collect()
    np.testing.assert_array_equal(found, np.full(LARGE, 2 * np.float32(RATE)))


def test_what_is_no_sum_may_not_be_left_out_nor_is_it_written_over() -> None:
    engine, stage = load_tiled(write_graph(*ADDING))
    assert not stage.zeros
    feeds = fill()
    run(engine, stage, feeds)
    assert (feeds["w"] == 1).all()
    del feeds["w"]
    with pytest.raises(StageFailed, match="'w' is missing"):
        run(engine, stage, feeds)
    engine, stage = load_adding()
    with pytest.raises(StageFailed, match=r"'w' has the shape \[2\] instead"):
        run(engine, stage, {**fill(), "w": np.ones(2, np.float32)})
