"""Graphs whose numbers of nodes and edges differ: a folder has a file for each."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from splitonnx.bundles import Bundle
from splitonnx.errors import SplitonnxError, StageFailed, UnusableData
from splitonnx.names import Target
from splitonnx.optimizers import SGD
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.server.servers import Server
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.commands import Command
from tests.support.small_models import (
    MODELS,
    Arrays,
    evaluate,
    hold_step,
    load_model,
)

NAME = "20_gnn"
SIZES = [(10, 17), (5, 1), (31, 80), (1, 1), (12, 3)]
"""Nodes and edges of each graph."""
RATE = 0.05
CUTS = [["r"], ["agg", "hx"]]


def draw_graph(nodes: int, edges: int) -> Arrays:
    random = np.random.default_rng(nodes)
    return {
        "x": random.standard_normal((nodes, 4), np.float32),
        "edges": random.integers(0, nodes, (2, edges)),
        "labels": random.integers(0, 3, nodes),
    }


GRAPHS = [draw_graph(*sizes) for sizes in SIZES]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "graphs"
    made.mkdir()
    for number, graph in enumerate(GRAPHS):
        np.savez(made / f"{number}.npz", **graph)  # type: ignore[arg-type]
    return made


def cut_at(at: list[str] | None, target: Target) -> Bundle:
    return cut(
        load_model(NAME), at=at, optimizer=SGD(lr=RATE), client_target=target, server_target=target
    )


def infer(weights: Mapping[str, np.ndarray], graph: Arrays) -> tuple[np.ndarray, Arrays]:
    """Compute in numpy what the model does: each node's sum over the edges that lead to it."""
    source, target = graph["edges"]
    adjacency = np.zeros((len(graph["x"]),) * 2)
    np.add.at(adjacency, (target, source), 1)
    spread = (adjacency + np.eye(len(adjacency))) @ graph["x"].astype(np.float64)
    hidden = np.maximum(spread @ weights["w1"], 0)
    return hidden @ weights["w2"], {"spread": spread, "hidden": hidden}


def train_in_numpy(graphs: list[Arrays]) -> tuple[list[float], Arrays]:
    """Train by gradients derived by hand, in float64."""
    tensors = load_model(NAME).graph.initializer
    weights = {
        tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float64)
        for tensor in tensors
        if tensor.name in ("w1", "w2")
    }
    losses = []
    for graph in graphs:
        scores, made = infer(weights, graph)
        rows = np.arange(len(scores))
        chances = np.exp(scores - scores.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        losses.append(float(-np.log(chances[rows, graph["labels"]]).mean()))
        chances[rows, graph["labels"]] -= 1
        gradient = chances / len(rows)
        back = (gradient @ weights["w2"].T) * (made["hidden"] > 0)
        weights["w2"] -= RATE * made["hidden"].T @ gradient
        weights["w1"] -= RATE * made["spread"].T @ back
    return losses, weights


@pytest.mark.parametrize("target", TARGETS)
def test_the_graph_given_predicts_and_trains_as_onnx_says(target: Target) -> None:
    with np.load(MODELS / f"{NAME}.npz") as data:
        graph = {name: data[name] for name in data.files}
    hold_step(cut_at(None, target), load_model(NAME), graph, ["w1", "w2"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("at", CUTS)
def test_graphs_of_all_sizes_train_through_a_server_as_in_numpy(
    folder: Path, tmp_path: Path, at: list[str], target: Target
) -> None:
    bundle = cut_at(at, target)
    assert verify(bundle, folder, steps=5).ok
    bundle.save(tmp_path / "bundle")
    with (
        Server(tmp_path / "bundle" / "server", port=0, threads=1) as server,
        Client(tmp_path / "bundle" / "client", server.url, threads=1) as client,
    ):
        history = client.fit(folder, epochs=2, shuffle=False, save=True)
        evaluated = client.evaluate(folder)
        predicted = client.predict(folder)["y"]
    losses, weights = train_in_numpy(GRAPHS * 2)
    np.testing.assert_allclose([record.loss for record in history.steps], losses, rtol=1e-5)
    assert [record.samples for record in history.steps] == [nodes for nodes, _ in SIZES] * 2
    scores = np.concatenate([infer(weights, graph)[0] for graph in GRAPHS])
    np.testing.assert_allclose(predicted, scores, rtol=1e-4, atol=1e-5)
    hits = scores.argmax(axis=1) == np.concatenate([graph["labels"] for graph in GRAPHS])
    assert evaluated["accuracy"] == pytest.approx(hits.mean())
    merged = onnx.load_from_string(merge(Bundle.load(tmp_path / "bundle")))
    expected = np.concatenate([evaluate(merged, graph)["y"] for graph in GRAPHS])
    np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_a_whole_model_trains_on_them_as_in_numpy(folder: Path, target: Target) -> None:
    with Client(cut_at(None, target).client, threads=1) as client:
        history = client.fit(folder, shuffle=False)
        state = client.state()
    losses, weights = train_in_numpy(GRAPHS)
    np.testing.assert_allclose([record.loss for record in history.steps], losses, rtol=1e-5)
    for name, weight in weights.items():
        np.testing.assert_allclose(state[name], weight, rtol=1e-4, atol=1e-6)


def test_a_run_that_ends_early_resumes_at_the_file_where_it_was(
    folder: Path, tmp_path: Path
) -> None:
    bundle = cut_at(["r"], "portable")
    states = []
    for name, stops in (("whole", 99), ("broken", 7)):
        place = tmp_path / name
        bundle.save(place)
        with Server(place / "server", port=0, threads=1, resume=True) as server:

            def stop(record: object, stops: int = stops) -> None:
                if record.step == stops:  # type: ignore[attr-defined]
                    raise InterruptedError

            try:
                with Client(place / "client", server.url, threads=1, seed=4) as client:
                    client.fit(folder, epochs=3, checkpoint_every=3, save=True, on_step=stop)
            except InterruptedError:
                with Client(place / "client", server.url, threads=1, seed=4, resume=True) as client:
                    client.fit(folder, epochs=3, checkpoint_every=3, save=True)
        saved = Bundle.load(place)
        states.append({k: v for p in saved.parties.values() for k, v in (p.trained or {}).items()})
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        np.testing.assert_array_equal(states[1][key], value)


def test_edges_that_lead_to_no_node_are_refused_and_end_nothing(folder: Path) -> None:
    graph = GRAPHS[1] | {"edges": np.array([[0], [5]])}
    np.savez(folder / "1.npz", **graph)  # type: ignore[arg-type]
    with (
        Client(cut_at(None, "portable").client, threads=1) as client,
        pytest.raises(StageFailed, match="5"),
    ):
        client.fit(folder, shuffle=False)


def test_a_graph_with_too_few_labels_is_named_before_the_first_step(folder: Path) -> None:
    np.savez(folder / "3.npz", **GRAPHS[0] | {"labels": GRAPHS[1]["labels"]})  # type: ignore[arg-type]
    with (
        Client(cut_at(None, "portable").client, threads=1) as client,
        pytest.raises(UnusableData, match=r"3\.npz: 'labels' should be .* where nodes = 10"),
    ):
        client.fit(folder, on_start=lambda: pytest.fail("it began"))


def test_a_graph_larger_than_the_server_takes_is_refused_in_a_sentence(
    folder: Path, tmp_path: Path
) -> None:
    cut_at(["r"], "portable").save(tmp_path / "bundle")
    limits = Limits(batch=30)
    with (
        Server(tmp_path / "bundle" / "server", port=0, threads=1, limits=limits) as server,
        Client(tmp_path / "bundle" / "client", server.url, threads=1) as client,
        pytest.raises(SplitonnxError, match="has 31 rows, over the server's limit of 30"),
    ):
        client.fit(folder, shuffle=False)
    assert client.steps == 2


def test_an_evaluation_counts_nodes_where_edges_are_the_first_input(folder: Path) -> None:
    model = load_model(NAME)
    model.graph.input.reverse()
    with Client(cut(model, at=None).client, threads=1) as client:
        evaluated = client.evaluate(folder)
        record = client.fit(folder, shuffle=False).steps[0]
    hits = [evaluate(model, g)["y"].argmax(axis=1) == g["labels"] for g in GRAPHS]
    assert evaluated["accuracy"] == pytest.approx(np.concatenate(hits).mean())
    assert record.samples == SIZES[0][0]


def test_the_commands_take_the_folder(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = Command(monkeypatch, capsys)
    bundle, model = tmp_path / "bundle", MODELS / f"{NAME}.onnx"
    command.succeed(
        "cut", model, "--at", "r", "--send-labels", "--send-input", "edges", "-o", bundle
    )
    assert "equal" in command.succeed("verify", bundle, "--data", folder)
    shutil.copytree(bundle / "server", tmp_path / "served")
    with Server(tmp_path / "served", port=0, threads=1) as server:
        line = command.fail(
            "train", bundle / "client", "--server", server.url, "--data", folder,
            "--batch-size", 8,
        )  # fmt: skip
        assert "--batch-size has no effect on a folder with one .npz file per batch" in line
        told = command.succeed(
            "train", bundle / "client", "--server", server.url, "--data", folder,
            "--eval-data", folder, "--epochs", 2,
        )  # fmt: skip
        assert "in all 10 steps of a whole run" in told
        made = tmp_path / "made"
        asked = ["predict", bundle / "client", "--server", server.url, "--data", folder, "-o", made]
        assert "made: 5 files" in command.succeed(*asked)
        assert "exists already" in command.fail(*asked)
        command.succeed(*asked, "--force")
        (made / "notes.txt").write_text("of mine")
        assert "holds 'notes.txt'" in command.fail(*asked, "--force")
        assert "the folder of the data" in command.fail(*asked[:-1], folder, "--force")
    shutil.copy(tmp_path / "served" / "state.safetensors", bundle / "server")
    merged = onnx.load_from_string(merge(Bundle.load(bundle)))
    for number, graph in enumerate(GRAPHS):
        with np.load(made / f"{number}.npz") as outputs:
            assert outputs.files == ["y"]
            np.testing.assert_allclose(
                outputs["y"], evaluate(merged, graph)["y"], rtol=1e-5, atol=1e-6
            )
