"""A bit that flips in a file of tensors is noticed, and the file stays one that others read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from splitonnx.bundles import PartyBundle
from splitonnx.checksums import CHECKSUM, encode_with_checksum, has_valid_checksum
from splitonnx.codecs import decode_tensors
from splitonnx.errors import BundleError, FormatError
from splitonnx.states import State, read_state, write_state
from tests.support import tiny
from tests.support.bit_flips import flips

SESSION = "0123456789abcdef" * 2


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tiny.split_bundle().save(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_every_altered_bit_of_the_weights_is_noticed(saved: Path) -> None:
    for _ in flips(saved / "client" / "weights.safetensors"):
        with pytest.raises((BundleError, FormatError), match=r"weights\.safetensors"):
            PartyBundle.load(saved / "client")
    assert PartyBundle.load(saved / "client").manifest.weights


@pytest.mark.parametrize("place", ["state.safetensors", f"outcomes/{SESSION}.safetensors"])
def test_every_altered_bit_of_a_state_is_noticed(saved: Path, place: str) -> None:
    folder = saved / "client"
    party = PartyBundle.load(folder)
    for session in (SESSION, "f" * 32):
        state = State(tensors=party.state(), step=3, session=session, position="{}", owner="ann")
        write_state(folder, state, party.manifest.digest)
    path = folder / place
    wanted = SESSION if "outcomes" in place else "f" * 32
    whole = read_state(folder, party.manifest, wanted)
    assert whole is not None
    assert (whole.session, whole.owner) == (wanted, "ann")
    for _ in flips(path):
        try:
            found = read_state(folder, party.manifest, wanted)
        except (BundleError, FormatError):
            continue
        # a name that cannot be read any more is of no session: the other one's is left
        assert found is not None
        assert found.session == "f" * 32
        assert wanted == SESSION


def write(**tensors: np.ndarray) -> bytes:
    return b"".join(encode_with_checksum(tensors, {"kind": "sample"}))


def test_a_file_with_a_checksum_is_one_that_safetensors_reads() -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True, False])}
    content = write(**arrays)
    for name, array in load(content).items():
        np.testing.assert_array_equal(array, arrays[name])
    tensors, metadata = decode_tensors(memoryview(content), max_header=1 << 14)
    assert tensors.keys() == arrays.keys()
    assert metadata["kind"] == "sample"
    assert has_valid_checksum(memoryview(content), metadata)


def test_the_checksum_is_sha256_with_zeros_in_its_own_place() -> None:
    content = write(a=np.ones(3, np.float32))
    found = decode_tensors(memoryview(content), max_header=1 << 14)[1][CHECKSUM]
    blank = content.replace(found.encode(), b"0" * 64)
    assert found == hashlib.sha256(blank).hexdigest()


@pytest.mark.parametrize("told", [{}, {CHECKSUM: ""}, {CHECKSUM: "0" * 64}])
def test_a_file_without_its_own_sum_is_not_whole(told: dict[str, str]) -> None:
    assert not has_valid_checksum(memoryview(write(a=np.ones(3, np.float32))), told)


def test_without_tensors_the_metadata_alone_are_guarded() -> None:
    content = bytearray(write())
    _, metadata = decode_tensors(memoryview(bytes(content)), max_header=1 << 14)
    assert has_valid_checksum(memoryview(content), metadata)
    place = content.index(b"sample")
    content[place] ^= 1
    assert not has_valid_checksum(memoryview(content), metadata)


def test_no_tensor_is_copied() -> None:
    array = np.ones(1000, np.float32)
    *_, data = encode_with_checksum({"a": array}, {})
    array[0] = 2.0
    assert np.frombuffer(data, np.float32)[0] == 2.0
