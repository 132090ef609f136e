"""An export that is not the network is refused with what differs, by names, numbers and modes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from splitonnx.errors import WrongExport
from splitonnx.torch.comparisons import check_modes, check_tensors
from splitonnx.torch.networks import Layout
from splitonnx.torch.observations import Observation

ARRAYS = {
    "a.weight": np.ones((2, 3), np.float32),
    "z.weight": np.ones((2, 3), np.float32),
    "n.running_mean": np.zeros(2, np.float32),
}
LAYOUT = Layout(
    groups={
        "a.weight": ("a.weight", "z.weight"),
        "z.weight": ("a.weight", "z.weight"),
        "n.running_mean": ("n.running_mean",),
    },
    parameters=frozenset({"a.weight", "z.weight"}),
    buffers=frozenset({"n.running_mean"}),
    learnt=frozenset({"a.weight", "z.weight"}),
    statistics=frozenset({"n.running_mean"}),
)


def see(
    unused: tuple[str, ...] = (), training: bool = True, dropouts: int = 0, is_random: bool = False
) -> Observation:
    return Observation(
        unused=frozenset(unused),
        training={"n.running_mean": 0.1} if training else {},
        frozen=frozenset() if training else frozenset({"n.running_mean"}),
        dropouts=dropouts,
        recurrent_dropout=False,
        is_random=is_random,
    )


def build(arrays: dict[str, np.ndarray], *nodes: onnx.NodeProto) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    return helper.make_model(helper.make_graph(nodes, "graph", [], [], tensors))


def leave_out(*names: str) -> dict[str, np.ndarray]:
    return {name: array for name, array in ARRAYS.items() if name not in names}


@pytest.mark.parametrize("tied", ["a.weight", "z.weight"])
def test_a_tied_weight_under_either_name_is_whole(tied: str) -> None:
    check_tensors("Net", build(leave_out(tied)), LAYOUT, ARRAYS, see())


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (ARRAYS, "'a.weight', 'z.weight': it should be one tensor, but is stored twice, not tied"),
        (leave_out("a.weight", "z.weight"), "'a.weight': it should be stored under this name"),
        (leave_out("a.weight", "n.running_mean"), "'n.running_mean': it should be stored under"),
        (leave_out("a.weight") | {"z.weight": np.zeros((2, 3), np.float32)}, "other numbers"),
        (leave_out("a.weight") | {"z.weight": np.ones((3, 2), np.float32)}, r"the shape of 'z.wei"),
    ],
)
def test_what_is_missing_or_different_is_named(arrays: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(WrongExport, match=words):
        check_tensors("Net", build(arrays), LAYOUT, ARRAYS, see())


def test_a_parameter_that_the_network_does_not_use_may_be_missing() -> None:
    arrays = leave_out("a.weight", "z.weight")
    check_tensors("Net", build(arrays), LAYOUT, ARRAYS, see(unused=("a.weight",)))


@pytest.mark.parametrize("training", [True, False])
def test_each_batchnorm_has_the_network_s_mode(training: bool) -> None:
    names = ["x", "s", "b", "n.running_mean", "v"]
    node = helper.make_node("BatchNormalization", names, ["y"], training_mode=int(training))
    model = build({}, node)
    check_modes("Net", model, LAYOUT, see(training=training))
    with pytest.raises(WrongExport, match=r"'n': it should be \w+ mode, but is in the other mode"):
        check_modes("Net", model, LAYOUT, see(training=not training))
    with pytest.raises(WrongExport, match="but is gone"):
        check_modes("Net", build({}), LAYOUT, see(training=training))


@pytest.mark.parametrize(("dropouts", "is_random"), [(1, False), (0, True)])
def test_a_dropout_that_is_gone_or_off_is_refused(dropouts: int, is_random: bool) -> None:
    norm = helper.make_node(
        "BatchNormalization", ["x", "s", "b", "n.running_mean", "v"], ["h"], training_mode=1
    )
    off = helper.make_node("Dropout", ["h"], ["y"])
    on = helper.make_node("Dropout", ["h", "ratio", "on"], ["y"])
    seen = see(dropouts=dropouts, is_random=is_random)
    check_modes("Net", build({}, norm, on), LAYOUT, seen)
    words = (
        "its dropout: it should be 1 or more Dropout nodes, but is 0"
        if dropouts
        else "what is random in training: it should be a dropout, but is gone from the file"
    )
    with pytest.raises(WrongExport, match=words):
        check_modes("Net", build({}, norm, off), LAYOUT, seen)


def test_noise_without_dropout_is_refused_with_the_node_that_draws_it() -> None:
    norm = helper.make_node(
        "BatchNormalization", ["x", "s", "b", "n.running_mean", "v"], ["h"], training_mode=1
    )
    noise = helper.make_node("RandomNormalLike", ["h"], ["y"], "noise")
    with pytest.raises(WrongExport, match="drawn in node 'noise'; draw the random numbers outside"):
        check_modes("Net", build({}, norm, noise), LAYOUT, see(is_random=True))


@pytest.mark.parametrize(("momentum", "expected"), [(0.3, "0.7"), (None, "a growing one")])
def test_statistics_that_would_move_otherwise_are_refused(
    momentum: float | None, expected: str
) -> None:
    names = ["x", "s", "b", "n.running_mean", "v"]
    model = build({}, helper.make_node("BatchNormalization", names, ["y"], training_mode=1))
    seen = replace(see(), training={"n.running_mean": momentum})
    with pytest.raises(WrongExport, match=f"'n': it should be {expected}, but is 0.9"):
        check_modes("Net", model, LAYOUT, seen)
