"""Sessions on a provider: checked against the CPU, and left to it where they fail.

The provider is ONNX Runtime's own for the CPU under another name, so that everything runs for real;
what a worse one would do is done to its sessions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from onnx import NodeProto, helper

from splitonnx.errors import StageFailed, StageStopped, UsageError, WrongRuntime
from splitonnx.manifests import Source, StageInput
from splitonnx.runtime.engine import providers
from splitonnx.runtime.engine.accelerators import (
    LOGGER,
    MOST_CHECKED,
    Accelerator,
    _shorten,
    compare,
)
from splitonnx.runtime.engine.engines import Engine, LoadedStage
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.engine.providers import Provider
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate provider 'CPUExecutionProvider'")

Outputs = Sequence[Any]
Spoil = Callable[["Worse", Outputs], Outputs]


def graph(*nodes: NodeProto, inputs: str, outputs: str) -> bytes:
    declared = tuple(StageInput(name=name, source=Source.DATA) for name in inputs.split())
    return tiny.make_graph(list(nodes), declared, tuple(outputs.split()))


ADD = graph(helper.make_node("Add", ["x", "w"], ["y"]), inputs="x w", outputs="y")
ONES = np.ones(3, np.float32)


class Worse:
    """A session that runs as it should, and then does something to the outputs."""

    def __init__(self, session: Any, spoil: Spoil) -> None:
        self.session = session
        self.spoil = spoil
        self.runs = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_ort_values(
        self, names: Sequence[str], feeds: Mapping[str, Any], options: Any
    ) -> Outputs:
        self.runs += 1
        return self.spoil(self, self.session.run_with_ort_values(names, feeds, options))


class Made:
    """Makes engines on the provider, whose sessions ``spoil`` makes worse from then on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened: list[Worse] = []
        self._patch = patch

    def engine(self, *, memory: str = "", spoil: Spoil | None = None) -> Engine:
        provider = Provider(
            name="own", runtime_name="CPUExecutionProvider", package="own", memory=memory
        )
        self._patch.setattr(providers, "PROVIDERS", {**providers.PROVIDERS, "own": provider})
        engine = Engine(threads=1, provider="own")
        if spoil is not None:
            open_real = Accelerator._open

            def open_worse(self_: Accelerator, graph: bytes, options: Any) -> Worse:
                self.opened.append(Worse(open_real(self_, graph, options), spoil))
                return self.opened[-1]

            self._patch.setattr(Accelerator, "_open", open_worse)
        return engine


@pytest.fixture
def made() -> Iterator[Made]:
    with pytest.MonkeyPatch.context() as patch:
        yield Made(patch)


def add(engine: Engine, stage: LoadedStage, x: np.ndarray = ONES) -> np.ndarray:
    feeds = {"x": engine.from_array(x), "w": engine.from_array(np.full_like(x, 2))}
    return engine.to_array(engine.run(stage, feeds)["y"])


def describe(engine: Engine) -> str:
    placement = engine.describe_placement()
    return "" if placement is None else placement.describe()


def negate(worse: Worse, outputs: Outputs) -> Outputs:
    (output,) = outputs
    return [type(output).ortvalue_from_numpy(-output.numpy())]


def fail(worse: Worse, outputs: Outputs) -> Outputs:
    raise RuntimeError("the device is on fire")


def refuse(self: Accelerator, graph: bytes, options: Any) -> Any:
    raise RuntimeError("While validating ONNX node '<Node(Add): n>': no Add here")


@pytest.mark.parametrize("memory", ["", "cpu"])
def test_a_stage_on_a_provider_gives_what_the_cpu_gives(made: Made, memory: str) -> None:
    engine = made.engine(memory=memory)
    stage = engine.load("add", ADD, training=False)
    for _ in range(3):
        np.testing.assert_array_equal(add(engine, stage), [3, 3, 3])


def test_where_tensors_have_a_place_outputs_are_bound_to_it(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = made.engine(memory="cpu")
    stage = engine.load("add", ADD, training=False)
    assert engine._accelerator is not None
    bound = []
    binding = engine._accelerator._ort.IOBinding
    bind = binding.bind_output

    def note(self: Any, *given: Any) -> None:
        bound.append(given)
        bind(self, *given)

    monkeypatch.setattr(binding, "bind_output", note)
    add(engine, stage)
    assert bound == [("y", "cpu", 0)]


def test_a_value_on_a_device_is_copied_to_the_host_and_one_on_the_host_is_not(made: Made) -> None:
    class Remote:
        def device_name(self) -> str:
            return "cuda"

        def numpy(self) -> np.ndarray:
            return ONES

    accelerator = made.engine()._accelerator
    assert accelerator is not None
    taken = accelerator.take(Remote())
    assert taken.device_name() == "cpu"
    np.testing.assert_array_equal(taken.numpy(), ONES)
    assert accelerator.take(taken) is taken


def test_after_two_runs_it_is_known_what_is_left_to_the_cpu(
    made: Made, caplog: pytest.LogCaptureFixture
) -> None:
    engine = made.engine()
    with caplog.at_level(logging.INFO, LOGGER):
        stage = engine.load("add", ADD, training=False)
        add(engine, stage)
        assert engine.describe_placement() is None
        add(engine, stage)
    # the provider here is the CPU, so all is left to it
    assert describe(engine).startswith("the provider own leaves to the CPU: 1 node of 'add'")
    assert "(1 Add); these take 100% of the time" in describe(engine)
    assert [record.getMessage() for record in caplog.records] == [describe(engine)]


def test_no_profile_is_left_on_the_disk(made: Made) -> None:
    engine = made.engine()
    assert engine._accelerator is not None
    folder = Path(engine._accelerator._folder)
    for name in ("one", "two"):
        stage = engine.load(name, ADD, training=False)
        add(engine, stage)
        add(engine, stage)
    assert list(folder.iterdir()) == []
    del engine, stage
    assert not folder.exists()


def test_wrong_values_never_come_out_and_the_stage_stays_on_the_cpu(made: Made) -> None:
    engine = made.engine(spoil=negate)
    stage = engine.load("add", ADD, training=False)
    for _ in range(3):
        np.testing.assert_array_equal(add(engine, stage), [3, 3, 3])
    assert made.opened[0].runs == 1
    assert "all of 'add', because its values of 'y' differ by 2 of their norm" in describe(engine)


def test_values_that_are_wrong_for_other_shapes_alone_are_found_too(made: Made) -> None:
    def negate_long(worse: Worse, outputs: Outputs) -> Outputs:
        return negate(worse, outputs) if outputs[0].shape()[0] > 3 else outputs

    engine = made.engine(spoil=negate_long)
    stage = engine.load("add", ADD, training=False)
    for length in (3, 3, 5, 3):
        found = add(engine, stage, np.ones(length, np.float32))
        np.testing.assert_array_equal(found, [3.0] * length)
    assert "differ" in describe(engine)


def test_shapes_that_were_checked_are_not_checked_again(made: Made) -> None:
    def negate_later(worse: Worse, outputs: Outputs) -> Outputs:
        return negate(worse, outputs) if worse.runs > MOST_CHECKED else outputs

    engine = made.engine(spoil=negate_later)
    stage = engine.load("add", ADD, training=False)
    for length in range(1, MOST_CHECKED + 1):
        add(engine, stage, np.ones(length, np.float32))
    np.testing.assert_array_equal(add(engine, stage, np.ones(1, np.float32)), [-3])


def test_a_provider_that_fails_in_a_run_leaves_the_stage_to_the_cpu(made: Made) -> None:
    engine = made.engine(spoil=fail)
    stage = engine.load("add", ADD, training=False)
    for _ in range(2):
        np.testing.assert_array_equal(add(engine, stage), [3, 3, 3])
    assert made.opened[0].runs == 1
    assert "because it fails: the device is on fire; these take 100% of" in describe(engine)


def test_inputs_that_fit_no_graph_are_the_caller_s_error(made: Made) -> None:
    engine = made.engine()
    stage = engine.load("add", ADD, training=False)
    feeds = {"x": engine.from_array(ONES), "w": engine.from_array(np.ones(2, np.float32))}
    with pytest.raises(StageFailed, match="Add"):
        engine.run(stage, feeds)
    np.testing.assert_array_equal(add(engine, stage), [3, 3, 3])
    assert "because" not in describe(engine)


def test_a_stage_that_was_stopped_is_not_tried_on_the_cpu(made: Made) -> None:
    def stop(worse: Worse, outputs: Outputs) -> Outputs:
        engine.stop()
        raise RuntimeError("terminated")

    engine = made.engine(spoil=stop)
    stage = engine.load("add", ADD, training=False)
    with pytest.raises(StageStopped):
        add(engine, stage)
    assert describe(engine) == ""


def test_a_graph_that_the_provider_refuses_runs_on_the_cpu(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = made.engine()
    monkeypatch.setattr(Accelerator, "_open", refuse)
    stage = engine.load("add", ADD, training=False)
    assert describe(engine) == (
        "the provider own leaves to the CPU: all of 'add', because it refuses the graph: node 'n' "
        "(Add): no Add here"
    )
    np.testing.assert_array_equal(add(engine, stage), [3, 3, 3])


def test_a_graph_that_nobody_runs_is_refused_as_on_the_cpu(made: Made) -> None:
    nodes = [helper.make_node("Reshape", ["x"], ["y"], allowzero=7)]
    with pytest.raises(StageFailed):
        made.engine().load("bad", graph(*nodes, inputs="x", outputs="y"), training=False)


def test_a_provider_that_does_not_start_is_refused_with_the_reason(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "_open", refuse)
    with pytest.raises(WrongRuntime, match="no Add here; check the device, its driver"):
        made.engine()


def test_a_provider_that_cannot_add_is_refused(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def run(self, *_: object) -> list[np.ndarray]:
            return [np.zeros(2, np.float32)]

    monkeypatch.setattr(Accelerator, "_open", lambda *_: Broken())
    with pytest.raises(WrongRuntime, match="adds 1 and 1 to 0"):
        made.engine()


def test_a_provider_that_this_build_lacks_is_refused() -> None:
    with pytest.raises(WrongRuntime, match=r"install splitonnx\[openvino\]"):
        Engine(provider="openvino")


def test_a_part_with_training_kernels_is_refused(made: Made) -> None:
    party = tiny.split_bundle().parties["server"]
    party = replace(party, manifest=structs.replace(party.manifest, target="training"))
    with pytest.raises(UsageError, match="--server-target portable"):
        Executor(party, made.engine())


def test_the_values_of_the_cpu_are_right_up_to_rounding() -> None:
    right = np.array([1e3, 1.0, -2.0])
    assert compare(right, right) == 0
    assert compare(right * (1 + 1e-6), right) < 1e-5
    assert compare(-right, right) == pytest.approx(2)


def test_a_gradient_that_is_rounding_alone_may_be_another() -> None:
    noise = np.array([1e-9, -2e-9], np.float32)
    assert compare(-noise, noise) < 1e-3
    assert compare(noise * 1e6, noise) > 1e-3


@pytest.mark.parametrize(
    ("found", "right"),
    [
        (np.ones(2), np.ones(3)),
        (np.ones(2, np.int64), np.ones(2, np.float32)),
        (np.array([np.nan, 1]), np.array([1.0, 1])),
        (np.array([1.0, 1]), np.array([np.nan, 1])),
        (np.array([-np.inf, 1]), np.array([np.inf, 1])),
    ],
)
def test_other_shapes_types_and_infinities_are_never_alike(
    found: np.ndarray, right: np.ndarray
) -> None:
    assert compare(found, right) == float("inf")


def test_equal_infinities_and_empty_values_are_alike() -> None:
    both = np.array([np.inf, np.nan, 1.0])
    assert compare(both, both.copy()) == 0
    assert compare(np.ones((0, 2)), np.ones((0, 2))) == 0


def test_masks_are_compared_as_numbers() -> None:
    mask = np.arange(8) % 2 == 0
    assert compare(~mask, mask) > 1


def test_an_error_is_told_without_places_in_a_provider_s_source() -> None:
    text = (
        "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running EP-sub node. "
        "Name:'sub' Status Message: Exception from src/a.cpp:75: Check 'x == y' failed at "
        "src/b.cpp:3: Can't set the input tensor"
    )
    assert _shorten(RuntimeError(text)) == "Can't set the input tensor"
    assert _shorten(RuntimeError("x" * 500)) == "x" * 160 + " ..."
