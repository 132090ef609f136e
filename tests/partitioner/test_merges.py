"""The verb merge: the trained weights of all parties in one plain model for inference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.bundles import Bundle
from splitonnx.errors import BundleError, BundleMismatch, UnwritableFile, UsageError
from splitonnx.partitioner import model_files
from splitonnx.partitioner.merges import collect_weights, merge, restore_model, write_merged
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from tests.support.carried import (
    BATCH,
    RECURRENT,
    build_delayed,
    build_recurrent,
    draw_data,
)
from tests.support.oracles import make_evaluator
from tests.support.zoo import ZOO


def cut_chain() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1")


def move_weights(bundle: Bundle, shift: float, steps: tuple[int, int] = (3, 3)) -> Bundle:
    """Pretend a training that added ``shift`` to every parameter."""
    parties = {}
    for (name, party), step in zip(bundle.parties.items(), steps, strict=True):
        state = party.state()
        moved = {n: a + np.float32(shift) if n in party.weights else a for n, a in state.items()}
        parties[name] = replace(party, trained=moved, step=step)
    return replace(bundle, parties=parties)


def evaluate(model: onnx.ModelProto | bytes, feeds: dict[str, np.ndarray]) -> np.ndarray:
    proto = onnx.ModelProto.FromString(model) if isinstance(model, bytes) else model
    (found,) = ReferenceEvaluator(proto).run(None, feeds)
    return np.asarray(found)


def feed(name: str) -> dict[str, np.ndarray]:
    entry = ZOO[name]
    data = entry.data(4)
    return {key: data[key] for key in entry.inputs}


@pytest.mark.parametrize("name", ["chain", "residual", "attention", "embedding", "shape_paths"])
def test_an_untrained_bundle_merges_into_the_model_that_was_cut(name: str) -> None:
    entry = ZOO[name]
    content = merge(cut(entry.build(), at=None, loss=entry.loss))
    model = onnx.ModelProto.FromString(content)
    onnx.checker.check_model(model, full_check=True)
    assert [v.name for v in model.graph.input] == [*entry.inputs]
    np.testing.assert_allclose(
        evaluate(model, feed(name)), evaluate(entry.build(), feed(name)), rtol=1e-5, atol=1e-6
    )


def test_trained_weights_of_both_parties_are_in_it() -> None:
    moved = move_weights(cut_chain(), 0.125)
    expected = ZOO["chain"].build()
    for tensor in expected.graph.initializer:
        array = numpy_helper.to_array(tensor) + np.float32(0.125)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    np.testing.assert_allclose(
        evaluate(merge(moved), feed("chain")), evaluate(expected, feed("chain")),
        rtol=1e-6, atol=1e-7,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["dropout", "batchnorm_trained"])
def test_it_is_in_inference_form(name: str) -> None:
    entry = ZOO[name]
    content = merge(cut(entry.build(), at="r1"))
    model = onnx.ModelProto.FromString(content)
    assert "Dropout" not in {node.op_type for node in model.graph.node}
    session = onnxruntime.InferenceSession(content)
    x = feed(name)["x"]
    whole = session.run(None, {"x": x})[0]
    parts = [session.run(None, {"x": x[i : i + 1]})[0] for i in range(len(x))]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-4, atol=1e-6)
    stored = {t.name for t in model.graph.initializer}
    read = {n for node in model.graph.node for n in node.input}
    assert stored <= read  # no ratio of a Dropout is left over


def test_merging_is_the_same_each_time_and_leaves_the_bundle_alone() -> None:
    bundle = cut_chain()
    before = {n: a.copy() for n, a in collect_weights(bundle).items()}
    assert merge(bundle) == merge(bundle)
    for name, array in collect_weights(bundle).items():
        np.testing.assert_array_equal(array, before[name])


def test_weights_are_gathered_as_trained_or_as_they_were() -> None:
    bundle = move_weights(cut_chain(), 1.0)
    stored = {t.name: numpy_helper.to_array(t) for t in ZOO["chain"].build().graph.initializer}
    trained, first = collect_weights(bundle), collect_weights(bundle, trained=False)
    assert trained.keys() == first.keys() == stored.keys()  # nothing of the optimizer
    for name, array in stored.items():
        np.testing.assert_array_equal(first[name], array)
        np.testing.assert_array_equal(trained[name], array + np.float32(1))
    model = restore_model(bundle, trained=False)
    weight = model.graph.initializers["w0"].const_value
    assert weight is not None
    np.testing.assert_array_equal(weight.numpy(), stored["w0"])


def test_parties_at_different_steps_do_not_fit() -> None:
    with pytest.raises(BundleMismatch, match="steps"):
        merge(move_weights(cut_chain(), 0.0, steps=(3, 4)))


def test_parties_of_different_sessions_do_not_fit() -> None:
    bundle = move_weights(cut_chain(), 0.0)
    names = iter(["one", "other"])
    parties = {n: replace(p, session=next(names)) for n, p in bundle.parties.items()}
    with pytest.raises(BundleMismatch, match="session"):
        merge(replace(bundle, parties=parties))


def test_a_folder_is_as_good_as_a_bundle(tmp_path: Path) -> None:
    bundle = cut_chain()
    bundle.save(tmp_path / "bundle")
    assert merge(tmp_path / "bundle") == merge(bundle)
    with pytest.raises(BundleError):
        merge(tmp_path / "nowhere")


def test_a_merged_model_is_written_once_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    bundle, path = cut_chain(), tmp_path / "new" / "model.onnx"
    size = write_merged(bundle, path)
    assert path.read_bytes() == merge(bundle)
    assert size == path.stat().st_size
    path.write_bytes(b"mine")
    with pytest.raises(UnwritableFile, match="exists already"):
        write_merged(bundle, path)
    assert path.read_bytes() == b"mine"
    write_merged(bundle, path, overwrite=True)
    assert path.read_bytes() == merge(bundle)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UnwritableFile, match="file"):
        write_merged(cut_chain(), tmp_path / "file" / "model.onnx")


def test_weights_too_large_for_one_file_stand_in_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = cut_chain()
    monkeypatch.setattr(model_files, "MAX_INSIDE", 100)
    with pytest.raises(UsageError, match="write_merged"):
        merge(bundle)
    path, beside = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    size = write_merged(bundle, path)
    assert size == path.stat().st_size + beside.stat().st_size
    onnx.checker.check_model(path)
    found = onnxruntime.InferenceSession(path).run(None, feed("chain"))[0]
    np.testing.assert_allclose(
        found, evaluate(ZOO["chain"].build(), feed("chain")), rtol=1e-5, atol=1e-6
    )
    beside.unlink()
    path.unlink()
    beside.write_bytes(b"mine")
    with pytest.raises(UnwritableFile, match=r"model\.onnx\.data"):
        write_merged(bundle, path)
    assert not path.exists()


def list_inputs(merged: bytes) -> tuple[list[str], dict[str, np.ndarray]]:
    """Return the names of a model's inputs, and the initial values of those that have one."""
    graph = onnx.load_from_string(merged).graph
    names = [value.name for value in graph.input]
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    return names, {name: stored[name] for name in names if name in stored}


def evaluate_state(data: dict[str, np.ndarray]) -> np.ndarray:
    results = make_evaluator(build_recurrent()).run(None, data)
    assert isinstance(results, list)
    return np.asarray(results[1])


@pytest.mark.parametrize("at", ["h", "a"])
def test_a_state_is_an_input_again_and_keeps_its_value_where_the_model_stored_one(
    at: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = np.full((BATCH, 5), 0.25, np.float32)
    data = {"x": draw_data(BATCH)["x"], "h_in": np.full((BATCH, 5), -0.5, np.float32)}
    for initial in (None, kept):
        model = build_recurrent(None if initial is None else initial - 1)
        bundle = cut(model, at=at, loss="mse", dims={"N": BATCH}, states=RECURRENT)
        parties = {
            name: replace(
                party, trained={n: kept if n == "h_in" else a for n, a in party.state().items()}
            )
            for name, party in bundle.parties.items()
        }
        caplog.clear()
        merged = merge(replace(bundle, parties=parties))
        names, stored = list_inputs(merged)
        assert names == ["x", "h_in"]
        assert ("reads 'h_in' as data again" in caplog.text) == (initial is None)
        session = onnxruntime.InferenceSession(merged)
        assert [output.name for output in session.get_outputs()] == ["y", "h_out"]
        expected = evaluate_state(data)
        np.testing.assert_allclose(session.run(None, data)[1], expected, rtol=1e-6)
        if initial is not None:
            np.testing.assert_array_equal(stored["h_in"], kept)
            expected = evaluate_state({**data, "h_in": kept})
            found = session.run(None, {"x": data["x"]})
            np.testing.assert_allclose(found[1], expected, rtol=1e-6)
        else:
            assert not stored


def test_raw_inputs_that_a_state_holds_are_merged_only_if_the_user_wants_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    initial = np.full((BATCH, 3), 0.5, np.float32)
    states, batch = {"after": "before"}, draw_data(BATCH)
    model = build_delayed(initial)
    bundle = cut(model, at=None, loss="mse", dims={"N": BATCH}, states=states)
    with Client(bundle.client, None, threads=1) as client:
        client.step(batch)
        trained = replace(bundle.client, trained=dict(client.state()), step=client.steps)
    bundle = replace(bundle, parties={"client": trained})
    content = merge(bundle)
    np.testing.assert_array_equal(list_inputs(content)[1]["before"], initial)
    assert batch["x"].tobytes() not in content
    assert "the initial value of the state 'before'" in caplog.text
    assert "raw input 'x'" in caplog.text
    caplog.clear()
    whole = merge(bundle, raw_states=True)
    np.testing.assert_array_equal(list_inputs(whole)[1]["before"], batch["x"])
    assert not caplog.text
