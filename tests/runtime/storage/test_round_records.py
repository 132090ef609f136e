"""Records of rounds are whole or not there, and belong to one bundle."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from splitonnx.checksums import encode_with_checksum
from splitonnx.errors import NotSaved
from splitonnx.runtime.storage.round_records import FORMAT, ROUNDS, RoundRecord, RoundRecords
from tests.support import tiny

ANN = "a" * 32
DIGEST = tiny.split_bundle().client.manifest.digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.split_bundle().save(tmp_path / "bundle")
    return tmp_path / "bundle" / "server"


def make_record(number: int) -> RoundRecord:
    return RoundRecord(
        number=number,
        tensors={"w": np.full(3, number, np.float32)},
        members=(ANN,),
        holder=ANN,
        adoptions={ANN: ((4, number), (2, 0))},
        version=10 + number,
        owners={ANN: "ann"},
    )


def test_what_was_written_is_read(folder: Path) -> None:
    RoundRecords(folder, DIGEST).write(make_record(5))
    found = RoundRecords(folder, DIGEST).read_newest()
    assert found is not None
    assert (found.number, found.members, found.holder) == (5, (ANN,), ANN)
    assert found.adoptions == {ANN: ((4, 5), (2, 0))}
    assert (found.version, found.owners) == (15, {ANN: "ann"})
    np.testing.assert_array_equal(found.tensors["w"], np.full(3, 5))


def test_the_newest_two_are_kept(folder: Path) -> None:
    records = RoundRecords(folder, DIGEST)
    for number in range(4):
        records.write(make_record(number))
    assert sorted(path.name for path in (folder / ROUNDS).iterdir()) == [
        "2.safetensors", "3.safetensors"
    ]  # fmt: skip


def test_a_new_training_removes_the_rounds_of_an_earlier_one(folder: Path) -> None:
    records = RoundRecords(folder, DIGEST)
    for number in (8, 9, 0):
        records.write(make_record(number))
    found = records.read_newest()
    assert found is not None
    assert found.number == 0


def test_a_damaged_record_is_passed_over_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = RoundRecords(folder, DIGEST)
    for number in (3, 4):
        records.write(make_record(number))
    path = folder / ROUNDS / "4.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = records.read_newest()
    assert found is not None
    assert found.number == 3
    assert "it was altered since it was written" in caplog.text


@pytest.mark.parametrize("name", ["0", "nine"])
def test_what_is_no_record_is_passed_over(folder: Path, name: str) -> None:
    (folder / ROUNDS).mkdir()
    (folder / ROUNDS / f"{name}.safetensors").write_bytes(b"no tensors")
    assert RoundRecords(folder, DIGEST).read_newest() is None


def test_a_record_of_another_bundle_is_passed_over(folder: Path) -> None:
    RoundRecords(folder, DIGEST).write(make_record(5))
    assert RoundRecords(folder, "e" * 64).read_newest() is None


def test_nothing_is_written_into_a_folder_that_is_another_bundle_s(folder: Path) -> None:
    with pytest.raises(NotSaved):
        RoundRecords(folder, "e" * 64).write(make_record(5))


def write_by_hand(folder: Path, **facts: object) -> None:
    """Write a record of round 5 with these facts and no others."""
    facts = {"format": FORMAT, "digest": DIGEST, "number": 5, "members": [ANN], "holder": "",
             "adoptions": {ANN: [[4, 5]]}, **facts}  # fmt: skip
    metadata = {"splitonnx": msgspec.json.encode(facts).decode()}
    (folder / ROUNDS).mkdir()
    content = encode_with_checksum({"w": np.full(3, 5, np.float32)}, metadata)
    (folder / ROUNDS / "5.safetensors").write_bytes(b"".join(content))


def test_a_record_of_an_earlier_version_which_knows_no_one_model_is_read(folder: Path) -> None:
    write_by_hand(folder)
    found = RoundRecords(folder, DIGEST).read_newest()
    assert found is not None
    assert (found.version, found.owners, found.members) == (0, {}, (ANN,))
    np.testing.assert_array_equal(found.tensors["w"], np.full(3, 5))


@pytest.mark.parametrize("facts", [{"version": -1}, {"owners": {ANN: 3}}, {"owner": "ann"}])
def test_a_record_with_other_facts_is_passed_over(folder: Path, facts: dict[str, object]) -> None:
    write_by_hand(folder, **facts)
    assert RoundRecords(folder, DIGEST).read_newest() is None


def test_the_newest_whole_record_before_a_round_is_read(folder: Path) -> None:
    records = RoundRecords(folder, DIGEST)
    for number in (4, 5):
        records.write(make_record(number))
    found = records.read_before(5)
    assert found is not None
    assert found.number == 4
    assert records.read_before(4) is None
