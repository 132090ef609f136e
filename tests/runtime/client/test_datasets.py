import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from splitonnx.errors import (
    ArrayMismatch,
    KeptArray,
    MissingArray,
    NotFinite,
    UnusableData,
    UsageError,
    ValueOutOfRange,
)
from splitonnx.runtime.client.datasets import check_batch, check_finite, join_outputs, open_dataset
from splitonnx.tensors import TensorSpec

X = TensorSpec(name="x", dtype="F32", shape=("N", 3))
LABELS = TensorSpec(name="labels", dtype="I64", shape=("N",), bounds=(0, 10))


def arrays(size: int = 10) -> dict[str, np.ndarray]:
    return {
        "x": np.arange(3 * size, dtype=np.float32).reshape(size, 3),
        "labels": np.arange(size, dtype=np.int64) % 10,
    }


def one_epoch(
    data: object, *, epoch: int = 0, seed: int = 0, shuffle: bool = False, drop_last: bool = False
) -> list[dict[str, np.ndarray]]:
    dataset = open_dataset(data)  # type: ignore[arg-type]
    return list(dataset.batches(4, seed=seed, epoch=epoch, shuffle=shuffle, drop_last=drop_last))


def rows(batches: list[dict[str, np.ndarray]]) -> list[int]:
    return [int(label) for batch in batches for label in batch["labels"]]


def test_an_npz_and_a_folder_of_npy_give_the_same_batches_as_the_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **arrays())  # type: ignore[arg-type]
    (tmp_path / "data").mkdir()
    for name, array in arrays().items():
        np.save(tmp_path / "data" / f"{name}.npy", array)
    for source in (arrays(), tmp_path / "data.npz", str(tmp_path / "data")):
        batches = one_epoch(source)
        assert [len(batch["x"]) for batch in batches] == [4, 4, 2]
        np.testing.assert_array_equal(np.concatenate([b["x"] for b in batches]), arrays()["x"])


def test_the_last_smaller_batch_can_be_left_out() -> None:
    assert rows(one_epoch(arrays(), drop_last=True)) == list(range(8))


def test_shuffling_follows_from_seed_and_epoch_and_keeps_rows_together() -> None:
    first = one_epoch(arrays(), shuffle=True)
    assert sorted(rows(first)) == list(range(10))
    assert rows(first) == rows(one_epoch(arrays(), shuffle=True))
    assert rows(first) != rows(one_epoch(arrays(), shuffle=True, epoch=1))
    assert rows(first) != rows(one_epoch(arrays(), shuffle=True, seed=1))
    for batch in first:
        np.testing.assert_array_equal(batch["x"][:, 0], 3 * batch["labels"])


def test_batches_of_an_iterable_are_taken_as_they_are_epoch_after_epoch() -> None:
    source = [arrays(3), arrays(5)]
    assert [len(batch["x"]) for batch in one_epoch(source)] == [3, 5]
    dataset = open_dataset(source)
    for epoch in range(2):
        assert len(list(dataset.batches(4, seed=0, epoch=epoch, shuffle=True))) == 2


def test_an_iterator_refuses_a_second_epoch() -> None:
    def generate() -> Iterator[dict[str, np.ndarray]]:
        yield arrays(3)

    dataset = open_dataset(generate())
    assert len(list(dataset.batches(4, seed=0, epoch=0, shuffle=False))) == 1
    with pytest.raises(UnusableData, match="one epoch"):
        list(dataset.batches(4, seed=0, epoch=1, shuffle=False))


def test_what_is_no_batch_is_named_by_its_number() -> None:
    with pytest.raises(UnusableData, match="batch 1 is a list"):
        one_epoch([arrays(2), [1, 2]])


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"x": None}, MissingArray, "no array 'x'; they hold 'labels'"),
        ({"x": np.zeros((10, 3))}, ArrayMismatch, r"F32\[N, 3\], but is F64.*astype\('float32'\)"),
        ({"labels": np.zeros(10, np.int32)}, ArrayMismatch, r"I32\[10\];.*astype\('int64'\)"),
        ({"x": np.zeros((10, 4), np.float32)}, ArrayMismatch, r"but is F32\[10, 4\]"),
        ({"labels": np.arange(1, 11)}, ValueOutOfRange, "holds 10; allowed are 0 to 9"),
        ({"labels": np.arange(-1, 9)}, ValueOutOfRange, "holds -1"),
    ],
)
def test_data_that_do_not_fit_are_told_before_the_first_step(
    change: dict[str, np.ndarray | None], error: type[Exception], sentence: str
) -> None:
    data = {name: array for name, array in (arrays() | change).items() if array is not None}
    with pytest.raises(error, match=sentence):
        open_dataset(data).check([X, LABELS])
    with pytest.raises(error):
        check_batch(data, [X, LABELS])
    with pytest.raises(error, match=sentence):
        open_dataset([arrays(), data]).check([X, LABELS])
    given = open_dataset(iter([arrays(), data]))
    given.check([X, LABELS])
    batches = given.batches(4, seed=0, epoch=0, shuffle=False)
    next(batches)
    with pytest.raises(error, match=sentence):
        next(batches)


def test_data_that_fit_pass_with_any_number_of_rows_and_more_arrays_than_asked() -> None:
    fixed = TensorSpec(name="x", dtype="F32", shape=(4, 3))
    open_dataset(arrays() | {"extra": np.zeros(10)}).check([fixed, LABELS])


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_row_that_is_not_finite_is_found_by_its_number_in_the_data(shuffle: bool) -> None:
    data = arrays()
    data["x"][7, 1] = np.nan
    with pytest.raises(NotFinite, match=r"'x' holds NaN or infinity \(row 7\)"):
        one_epoch(data, shuffle=shuffle)


def test_infinity_in_a_given_batch_is_found_and_integers_are_left_alone() -> None:
    data = arrays(3)
    check_finite(data, "")
    data["x"][2, 0] = np.inf
    with pytest.raises(NotFinite, match="batch 0, row 2"):
        one_epoch([data])


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({}, "no arrays"),
        ({"x": np.zeros((3, 1)), "labels": np.zeros(2)}, "rows: 'x' 3, 'labels' 2"),
        ({"x": np.zeros((0, 3))}, "no samples"),
        ({"x": np.float32(1)}, "no samples"),
    ],
)
def test_arrays_that_are_no_set_of_samples_are_refused(
    data: dict[str, np.ndarray], sentence: str
) -> None:
    with pytest.raises(UnusableData, match=sentence):
        open_dataset(data)


def test_files_that_hold_no_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "objects.npz", x=np.array([{}, []], dtype=object))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "objects.npz").read_bytes()[:100])
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    (tmp_path / "empty").mkdir()
    for name, sentence in {
        "text.npz": "cannot be read as arrays",
        "objects.npz": "allow_pickle=False",
        "cut.npz": "cannot be read as arrays",
        "single.npz": "single array",
        "empty": "no arrays",
        "absent.npz": "No such file",
        "data.csv": "an .npz file, a folder",
    }.items():
        with pytest.raises(UnusableData, match=sentence) as caught:
            open_dataset(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_folder_of_arrays_is_mapped_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", arrays()["x"])
    batch = one_epoch(tmp_path)[0]["x"]
    base = batch
    while not isinstance(base, np.memmap):
        assert base.base is not None
        base = base.base


@pytest.mark.parametrize(
    ("dim", "rows", "advice"),
    [
        (1, 4, "`splitonnx check` says where"),
        ("N + 1", 1, "cut for 2 rows or more; `splitonnx check` says why"),
    ],
)
def test_a_number_of_rows_that_a_model_never_takes_is_told_with_advice(
    dim: int | str, rows: int, advice: str
) -> None:
    spec = TensorSpec(name="x", dtype="F32", shape=(dim, 3))
    with pytest.raises(ArrayMismatch, match=advice):
        check_batch({"x": np.zeros((rows, 3), np.float32)}, [spec])
    with pytest.raises(ArrayMismatch) as other:
        check_batch({"x": np.zeros((rows, 4), np.float32)}, [spec])
    assert (advice in str(other.value)) is isinstance(dim, str)


@pytest.mark.parametrize("dim", ["unk__loop", "N", "N + 1", 2])
def test_a_batch_of_an_empty_array_is_to_be_left_out(dim: int | str, tmp_path: Path) -> None:
    specs = [TensorSpec(name="labels", dtype="F32", shape=(dim, 3))]
    told = r"is F32\[0, 3\]; .* Loop without an iteration; leave this batch out of the data"
    batch = {"labels": np.zeros((0, 3), np.float32)}
    with pytest.raises(ArrayMismatch, match=told) as refused:
        check_batch(batch, specs)
    assert "splitonnx check" not in str(refused.value)
    np.savez(tmp_path / "0.npz", **batch)  # type: ignore[arg-type]
    with pytest.raises(UnusableData, match=rf"0\.npz.*{told}"):
        open_dataset(tmp_path).check(specs)


def save_batches(folder: Path, *sizes: int) -> Path:
    for number, size in enumerate(sizes):
        batch: dict[str, np.ndarray] = arrays(size) | {"labels": np.full(size, number)}
        np.savez(folder / f"{number}.npz", **batch)  # type: ignore[arg-type]
    return folder


def test_each_npz_of_a_folder_is_a_batch_of_its_own_size(tmp_path: Path) -> None:
    folder = save_batches(tmp_path, 3, 5, 1)
    batches = one_epoch(folder, drop_last=True)
    assert [len(batch["x"]) for batch in batches] == [3, 5, 1]
    dataset = open_dataset(folder)
    assert (dataset.size, dataset.has_own_batches, dataset.count_batches(32)) == (3, True, 3)


def test_files_are_shuffled_as_rows_are(tmp_path: Path) -> None:
    folder = save_batches(tmp_path, *[1] * 10)
    alone = np.arange(10)
    np.random.default_rng([7, 2]).shuffle(alone)
    assert rows(one_epoch(folder, shuffle=True, seed=7, epoch=2)) == alone.tolist()
    assert rows(one_epoch(folder, shuffle=True, seed=7, epoch=2)) == alone.tolist()
    assert rows(one_epoch(folder, shuffle=True, seed=7, epoch=3)) != alone.tolist()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": None}, "no array 'x'"),
        ({"x": np.zeros((2, 3))}, r"should be F32\[N, 3\], but is F64"),
        ({"x": np.zeros((2, 3, 1), np.float32)}, r"but is F32\[2, 3, 1\]"),
        ({"x": np.zeros((4, 3), np.float32)}, r"\[N\] where N = 4, but is I64\[2\]"),
        ({"labels": np.array([0, 10])}, "holds 10"),
    ],
)
def test_the_file_that_does_not_fit_is_named_before_the_first_step(
    tmp_path: Path, change: dict[str, np.ndarray | None], sentence: str
) -> None:
    folder = save_batches(tmp_path, 2, 2, 2)
    changed = {name: array for name, array in (arrays(2) | change).items() if array is not None}
    np.savez(folder / "1.npz", **changed)  # type: ignore[arg-type]
    with pytest.raises(UnusableData, match=rf"1\.npz: .*{sentence}"):
        open_dataset(folder).check([X, LABELS])


def test_a_file_that_changed_since_it_was_checked_is_checked_again(tmp_path: Path) -> None:
    dataset = open_dataset(save_batches(tmp_path, 2, 2))
    dataset.check([X, LABELS])
    np.savez(tmp_path / "1.npz", x=np.zeros((2, 3)), labels=np.zeros(2, np.int64))
    batches = dataset.batches(4, seed=0, epoch=0, shuffle=False)
    next(batches)
    with pytest.raises(UnusableData, match=r"1\.npz: .*is F64"):
        next(batches)


def test_a_value_that_is_not_finite_is_found_with_its_file(tmp_path: Path) -> None:
    folder = save_batches(tmp_path, 2)
    np.savez(folder / "0.npz", x=np.array([[0], [np.inf]], np.float32))
    with pytest.raises(NotFinite, match=r"0\.npz, row 1"):
        one_epoch(folder)


def test_no_more_than_one_file_is_in_memory(tmp_path: Path) -> None:
    for number in range(4):
        np.savez(tmp_path / f"{number}.npz", x=np.zeros((1 << 17, 8)))  # 8 MiB
    dataset = open_dataset(tmp_path)
    tracemalloc.start()
    try:
        dataset.check([TensorSpec(name="x", dtype="F64", shape=("N", 8))])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        for _ in dataset.batches(1, seed=0, epoch=0):
            pass
        assert tracemalloc.get_traced_memory()[1] < 28 << 20
    finally:
        tracemalloc.stop()


def test_labels_of_another_shape_are_refused_with_a_word_on_the_axis_of_the_classes() -> None:
    spec = TensorSpec(name="labels", dtype="I64", shape=("N", 5), bounds=(0, 7))
    with pytest.raises(ArrayMismatch, match=r"I64\[16, 7\]; if the classes .* --class-axis AXIS"):
        check_batch({"labels": np.zeros((16, 7), np.int64)}, [spec])
    image = TensorSpec(name="x", dtype="F32", shape=("N", 5))
    with pytest.raises(ArrayMismatch, match=r"\[16, 7\]$"):
        check_batch({"x": np.zeros((16, 7), np.float32)}, [image])


def test_samples_of_all_batches_stand_one_after_the_other() -> None:
    joined = join_outputs([{"y": np.ones((2, 3))}, {"y": np.zeros((1, 3))}], {"y": 0})
    np.testing.assert_array_equal(joined["y"], [[1, 1, 1], [1, 1, 1], [0, 0, 0]])


def test_batches_are_joined_along_the_axis_of_their_samples() -> None:
    whole = np.arange(24).reshape(2, 4, 3)
    joined = join_outputs([{"h": whole[:, :3]}, {"h": whole[:, 3:]}], {"h": 1})
    np.testing.assert_array_equal(joined["h"], whole)


def test_a_single_number_has_one_entry_for_each_batch() -> None:
    joined = join_outputs([{"s": np.array(1)}, {"s": np.array(2)}], {})
    np.testing.assert_array_equal(joined["s"], [1, 2])


@pytest.mark.parametrize("axis", [0, 1])
def test_other_sizes_that_differ_are_refused(axis: int) -> None:
    batches = [{"y": np.ones((2, 3, 5))}, {"y": np.ones((2, 3, 4))}]
    with pytest.raises(UsageError, match=r"'y' differ.*predict_batches"):
        join_outputs(batches, {"y": axis})


def test_an_array_for_what_the_model_keeps_itself_is_refused(tmp_path: Path) -> None:
    data = arrays(4) | {"moved": np.zeros((4, 2), np.float32)}
    np.savez(tmp_path / "0.npz", **data)  # type: ignore[arg-type]
    for source in (data, [arrays(4), data], tmp_path):  # a file's error names the file
        dataset = open_dataset(source)
        with pytest.raises((KeptArray, UnusableData), match="'moved', but the model keeps this"):
            dataset.check([X, LABELS], {"moved"})
        dataset.check([X, LABELS], {"other"})
    late = open_dataset(iter([data]))
    late.check([X, LABELS], {"moved"})
    with pytest.raises(KeptArray):
        next(late.batches(4, seed=0, epoch=0))
