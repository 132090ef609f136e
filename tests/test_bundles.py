import hashlib
import os
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from splitonnx import atomic, bundles
from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import BundleError, FormatError
from splitonnx.manifests import Role, StateSpec
from splitonnx.states import State, write_state
from splitonnx.tensors import TensorSpec
from tests.support import tiny


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny.split_bundle().save(tmp_path / "bundle")
    return tmp_path / "bundle"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def hash_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit(path: Path, old: str, new: str) -> None:
    """Edit a file; a manifest then is one without a sum of its own."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new).replace('"sha256": ', '"no sum": '))


def trained(party: PartyBundle) -> dict[str, np.ndarray]:
    return {name: array + 1 for name, array in party.state().items()}


def test_a_bundle_comes_back_as_it_was_saved(saved: Path) -> None:
    original, loaded = tiny.split_bundle(), Bundle.load(saved)
    assert loaded.manifest == msgspec.structs.replace(
        original.manifest, files={"model.onnx": hash_file(saved / "model.onnx")}
    )
    assert loaded.skeleton == original.skeleton
    assert loaded.server is not None
    for name, party in loaded.parties.items():
        assert party.manifest == msgspec.structs.replace(
            original.parties[name].manifest, weights=hash_file(saved / name / "weights.safetensors")
        )
        assert party.graphs == original.parties[name].graphs
        assert party.path == saved / name
        assert party.step == 0
        for weight, array in party.weights.items():
            np.testing.assert_array_equal(array, original.parties[name].weights[weight])


def test_a_party_s_folder_stands_on_its_own(saved: Path, tmp_path: Path) -> None:
    os.rename(saved / "client", tmp_path / "elsewhere")
    assert PartyBundle.load(tmp_path / "elsewhere").manifest.party == "client"
    assert set(contents(saved / "server")) == {
        "manifest.json",
        "weights.safetensors",
        "body.step.onnx",
        "body.update.onnx",
        "body.predict.onnx",
    }


def test_a_bundle_left_whole_has_no_server() -> None:
    assert tiny.local_bundle().server is None


def test_the_state_starts_with_the_weights_and_an_optimizer_of_zeros() -> None:
    state = tiny.local_bundle().client.state()
    assert list(state) == ["W1", "W1.m", "W2", "W2.m"]
    np.testing.assert_array_equal(state["W2"], tiny.WEIGHTS["W2"])
    assert state["W2.m"].dtype == np.float32
    np.testing.assert_array_equal(state["W2.m"], np.zeros((4, 2)))


def test_a_written_state_is_what_the_party_goes_on_from(saved: Path) -> None:
    party = PartyBundle.load(saved / "client")
    write_state(saved / "client", State(tensors=trained(party), step=12), party.manifest.digest)
    again = PartyBundle.load(saved / "client")
    assert again.step == 12
    for name, array in trained(party).items():
        np.testing.assert_array_equal(again.state()[name], array)
    np.testing.assert_array_equal(again.weights["W1"], tiny.WEIGHTS["W1"])


def test_a_state_is_saved_with_its_bundle(saved: Path, tmp_path: Path) -> None:
    bundle = Bundle.load(saved)
    client = replace(bundle.client, trained=trained(bundle.client), step=3)
    copy = replace(bundle, parties={**bundle.parties, "client": client})
    copy.save(tmp_path / "copy")
    loaded = Bundle.load(tmp_path / "copy").client
    assert loaded.step == 3
    np.testing.assert_array_equal(loaded.state()["W1.m"], np.ones((3, 4)))


def test_mapped_arrays_outlive_a_state_that_replaces_their_file(saved: Path) -> None:
    party = PartyBundle.load(saved / "client")
    write_state(saved / "client", State(tensors=trained(party), step=1), party.manifest.digest)
    loaded = PartyBundle.load(saved / "client")
    write_state(saved / "client", State(tensors=party.state(), step=2), party.manifest.digest)
    np.testing.assert_array_equal(loaded.state()["W1"], tiny.WEIGHTS["W1"] + 1)


def test_arrays_of_a_loaded_bundle_are_read_only(saved: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        PartyBundle.load(saved / "client").weights["W1"][0, 0] = 1


@pytest.mark.parametrize(
    "name", ["manifest.json", "model.onnx", "server/manifest.json", "server/body.step.onnx",
             "client/weights.safetensors"]
)  # fmt: skip
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(BundleError, match=f"'{Path(name).name}' cannot be read"):
        Bundle.load(saved)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"absent: 'manifest\.json' cannot be read"):
        PartyBundle.load(tmp_path / "absent")


def test_an_altered_graph_is_noticed(saved: Path) -> None:
    with (saved / "client" / "head.forward.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=r"head\.forward\.onnx: it was altered"):
        Bundle.load(saved)


def test_a_stage_without_a_declared_file_is_noticed(saved: Path) -> None:
    edit(saved / "client" / "manifest.json", '"graph": "evaluate.onnx"', '"graph": "other.onnx"')
    with pytest.raises(BundleError, match=r"lacks the file 'other\.onnx'"):
        Bundle.load(saved)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "..", "", "a\\u0000b", "a\\n"])
def test_a_file_outside_the_folder_is_never_read(saved: Path, name: str) -> None:
    edit(saved / "client" / "manifest.json", '"evaluate.onnx"', f'"{name}"')
    with pytest.raises(BundleError, match="not a plain name"):
        Bundle.load(saved)


def test_parties_of_two_cuts_do_not_make_a_bundle(saved: Path) -> None:
    edit(saved / "server" / "manifest.json", "d1d1", "d2d2")
    with pytest.raises(BundleError, match="another bundle"):
        Bundle.load(saved)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({}, "differ in 'W1'"),
        ({"W1": tiny.WEIGHTS["W1"], "W9": np.zeros(2, np.float32)}, "differ in 'W9'"),
        ({"W1": tiny.WEIGHTS["W1"].T}, r"should be F32\[3, 4\], but is F32\[4, 3\]"),
        ({"W1": tiny.WEIGHTS["W1"].astype(np.float64)}, "but is F64"),
    ],
)
def test_weights_other_than_declared_are_refused(
    tmp_path: Path, weights: dict[str, np.ndarray], sentence: str
) -> None:
    bundle = tiny.split_bundle()
    parties = {**bundle.parties, "client": replace(bundle.client, weights=weights)}
    replace(bundle, parties=parties).save(tmp_path / "bundle")
    with pytest.raises(BundleError, match=sentence):
        Bundle.load(tmp_path / "bundle")


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0no tensors at all"])
def test_weights_that_are_no_tensor_file_are_refused(saved: Path, content: bytes) -> None:
    (saved / "client" / "weights.safetensors").write_bytes(content)
    with pytest.raises((BundleError, FormatError), match=r"client.*weights\.safetensors"):
        Bundle.load(saved)


def test_a_state_of_another_bundle_is_refused(saved: Path) -> None:
    write_state(
        saved / "client", State(tensors=PartyBundle.load(saved / "client").state(), step=1), "other"
    )
    with pytest.raises(BundleError, match="another bundle"):
        Bundle.load(saved)


def test_nothing_is_overwritten_unless_asked_and_then_only_a_bundle(
    saved: Path, tmp_path: Path
) -> None:
    before = contents(saved)
    with pytest.raises(BundleError, match="exists already"):
        tiny.local_bundle().save(saved)
    assert contents(saved) == before
    tiny.local_bundle().save(saved, overwrite=True)
    assert Bundle.load(saved).server is None
    assert not (saved / "server").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "manifest.json").write_text("{}")
    with pytest.raises(BundleError, match="not a bundle"):
        tiny.local_bundle().save(tmp_path / "photos", overwrite=True)
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["manifest.json"]


def test_a_loaded_bundle_can_be_saved_over_itself(saved: Path) -> None:
    before = contents(saved)
    Bundle.load(saved).save(saved, overwrite=True)
    assert contents(saved) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_save_that_fails_midway_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    if overwrite:
        tiny.split_bundle().save(tmp_path / "bundle")
    before = contents(tmp_path)
    write = atomic.write_file
    written: list[Path] = []

    def fail_late(path: Path, chunks: list[bytes]) -> None:
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, chunks)

    monkeypatch.setattr(bundles, "write_file", fail_late)
    with pytest.raises(BundleError, match="No space left on device"):
        tiny.local_bundle().save(tmp_path / "bundle", overwrite=overwrite)
    assert contents(tmp_path) == before


def test_the_old_bundle_returns_if_the_new_one_cannot_take_its_place(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, rename = contents(saved.parent), os.rename

    def fail_for_the_new(source: Path, target: Path) -> None:
        if Path(source).name == "fresh":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(atomic, "exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fail_for_the_new)
    with pytest.raises(BundleError, match="Input/output error"):
        tiny.local_bundle().save(saved, overwrite=True)
    assert contents(saved.parent) == before


def test_a_state_that_cannot_be_written_leaves_the_old_one(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    party = PartyBundle.load(saved / "client")
    write_state(saved / "client", State(tensors=party.state(), step=1), party.manifest.digest)
    before = contents(saved)

    def fail(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(BundleError, match="No space left"):
        write_state(saved / "client", State(tensors=trained(party), step=2), party.manifest.digest)
    assert contents(saved) == before


def test_manifests_of_another_format_are_refused(saved: Path) -> None:
    manifest = msgspec.structs.replace(tiny.split_bundle().manifest, format="splitonnx.bundle/9")
    (saved / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    with pytest.raises(FormatError, match=r"splitonnx\.bundle/9"):
        Bundle.load(saved)


@pytest.mark.parametrize(
    "tensor",
    [
        TensorSpec(name="m", dtype="F128", shape=(3, 4)),
        TensorSpec(name="m", dtype="F32", shape=("N", 4)),
        TensorSpec(name="m", dtype="F32", shape=(None,)),
        TensorSpec(name="m", dtype="F32", shape=(-3, 4)),
        TensorSpec(name="m", dtype="F32", shape=(1 << 40, 1 << 40)),  # no parameter has it
    ],
)
def test_a_state_that_no_party_can_hold_is_refused_before_memory_is_taken(
    saved: Path, tensor: TensorSpec
) -> None:
    party = tiny.split_bundle().client.manifest
    state = (*party.state, StateSpec(tensor=tensor, role=Role.OPTIMIZER))
    content = msgspec.json.encode(msgspec.structs.replace(party, state=state))
    (saved / "client" / "manifest.json").write_bytes(content)
    with pytest.raises(FormatError, match="no party has a state 'm'"):
        PartyBundle.load(saved / "client")


def test_no_more_zeros_are_made_than_an_optimizer_has(saved: Path) -> None:
    party = tiny.split_bundle().client.manifest
    weight = next(spec.tensor for spec in party.state if spec.role is Role.PARAMETER)
    many = [
        StateSpec(tensor=msgspec.structs.replace(weight, name=f"m{number}"), role=Role.OPTIMIZER)
        for number in range(9)
    ]
    twice = StateSpec(tensor=weight, role=Role.PARAMETER)
    for state in ((*party.state, *many), (*party.state, twice)):
        content = msgspec.json.encode(msgspec.structs.replace(party, state=state))
        (saved / "client" / "manifest.json").write_bytes(content)
        with pytest.raises(FormatError, match="no party has a state"):
            PartyBundle.load(saved / "client")
