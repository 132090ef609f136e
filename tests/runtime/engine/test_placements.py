"""What a provider left to the CPU: read from ONNX Runtime's profile, and put into a sentence."""

from __future__ import annotations

import json

from splitonnx.runtime.engine.placements import Placement, StagePlacement, read_profile

CPU, FAST = "CPUExecutionProvider", "FastExecutionProvider"


def node(name: str, operator: str, provider: str, at: int, duration: int) -> dict[str, object]:
    about = {"op_name": operator, "provider": provider}
    return {"cat": "Node", "name": name, "ts": at, "dur": duration, "args": about}


def run(at: int) -> dict[str, object]:
    return {"cat": "Session", "name": "model_run", "ts": at, "dur": 100, "args": {}}


def read(*events: dict[str, object]) -> tuple[dict[str, int], float]:
    profile = read_profile(json.dumps(events).encode())
    return dict(profile.left), profile.share


def test_nodes_on_the_cpu_are_counted_by_operator_with_their_share_of_the_time() -> None:
    events = [
        run(0),
        node("a_kernel_time", "Gather", CPU, 1, 10),
        node("b_kernel_time", "Gather", CPU, 2, 10),
        node("c_kernel_time", "Size", CPU, 3, 5),
        node("d_kernel_time", "Conv", FAST, 4, 75),
    ]
    assert read(*events) == ({"Gather": 2, "Size": 1}, 0.25)


def test_only_the_last_run_counts_since_the_first_one_is_slow() -> None:
    first = [run(0), node("a", "Gather", CPU, 1, 1000), node("d", "Conv", FAST, 2, 1)]
    second = [run(100), node("a", "Gather", CPU, 101, 1), node("d", "Conv", FAST, 102, 3)]
    assert read(*first, *second) == ({"Gather": 1}, 0.25)


def test_a_node_that_runs_several_times_in_a_loop_is_one_node() -> None:
    assert read(run(0), *(node("a", "Add", CPU, at, 1) for at in range(5))) == ({"Add": 5 // 5}, 1)


def test_a_profile_without_nodes_has_no_time_on_the_cpu() -> None:
    assert read() == ({}, 0.0)
    assert read(run(0), node("d", "Conv", FAST, 1, 5)) == ({}, 0.0)


def test_a_sentence_says_which_nodes_are_left_and_how_long_they_take() -> None:
    stages = [
        StagePlacement(stage="head.forward", left={"Gather": 2}, seconds=0.1, cpu_seconds=0.02),
        StagePlacement(stage="update", left={"Size": 1}, seconds=0.1),
    ]
    assert Placement(provider="cuda", stages=stages).describe() == (
        "the provider cuda leaves to the CPU: 3 nodes of 'head.forward', 'update' (2 Gather, "
        "1 Size); these take 10% of the time"
    )


def test_a_stage_that_is_left_as_a_whole_is_named_with_the_reason() -> None:
    reason = "its values of 'loss' differ by 0.1 of their norm"
    whole = StagePlacement(stage="body.step", reason=reason)
    assert whole.describe("openvino:GPU") == (
        f"the provider openvino:GPU leaves to the CPU: all of 'body.step', because {reason}"
    )


def test_a_provider_that_runs_everything_is_said_to() -> None:
    stages = [StagePlacement(stage="a", seconds=1.0), StagePlacement(stage="b", seconds=1.0)]
    sentence = Placement(provider="cuda", stages=stages).describe()
    assert sentence == "the provider cuda runs every node of 'a', 'b'"


def test_a_long_list_of_operators_is_cut_short() -> None:
    left = {f"Op{number}": 1 for number in range(9)}
    sentence = StagePlacement(stage="a", left=left).describe("cuda")
    assert "9 nodes" in sentence
    assert sentence.endswith("1 Op5, ...)")


def test_programs_get_the_same_as_values() -> None:
    stages = [StagePlacement(stage="a", left={"Size": 1}, seconds=2.0, cpu_seconds=1.0)]
    summary = Placement(provider="cuda", stages=stages).summarize()
    assert json.loads(json.dumps(summary)) == {
        "provider": "cuda",
        "sentence": "the provider cuda leaves to the CPU: 1 node of 'a' (1 Size); these take 50% "
        "of the time",
        "cpu_share": 0.5,
        "stages": [{"stage": "a", "reason": "", "left": {"Size": 1}}],
    }
