"""The example of an export is read by the names of forward's parameters, with a batch in front."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from splitonnx.errors import UsageError  # noqa: E402 - after the skip
from splitonnx.torch.examples import read_example  # noqa: E402
from tests.support.torch_networks import Convolutional, Masked  # noqa: E402

DATA, MASK = torch.randn(3, 6, 8), torch.zeros(3, 6, dtype=torch.bool)


def test_inputs_have_the_names_of_forward_s_parameters() -> None:
    by_position = read_example(torch, Masked(), (DATA, MASK))
    by_name = read_example(torch, Masked(), {"mask": MASK, "data": DATA})
    assert list(by_position.tensors) == list(by_name.tensors) == ["data", "mask"]
    assert by_position.arguments == (DATA, MASK)
    assert (by_position.keywords, by_name.arguments) == ({}, ())


def test_a_single_sample_is_repeated_since_exporters_write_sizes_of_1() -> None:
    example = read_example(torch, Convolutional(), torch.randn(1, 1, 6, 6))
    assert example.batch == 2
    assert torch.equal(example.tensors["image"][0], example.tensors["image"][1])


def test_another_batch_repeats_the_samples_in_another_order() -> None:
    example = read_example(torch, Masked(), (DATA, MASK)).resize(4)
    assert torch.equal(example.tensors["data"], DATA[[2, 1, 0, 2]])


@pytest.mark.parametrize(
    ("example", "words"),
    [
        ((DATA, MASK[:2]), r"the shapes are 'data' \[3, 6, 8\], 'mask' \[2, 6\]"),
        ((DATA, torch.tensor(1.0)), r"'mask' \[\]"),
        ((DATA, 0.5), "input 'mask' of the example should be a tensor, not float"),
        ((DATA, MASK, MASK), "the example has 3 inputs, but forward takes 2"),
        ({}, "the example has no inputs"),
        ("data", "should be a tensor, a tuple of tensors"),
    ],
)
def test_what_is_not_a_batch_of_tensors_is_refused(example: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_example(torch, Masked(), example)
