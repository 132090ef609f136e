"""The size of a block, as ONNX Runtime has it on this machine or on others."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import pytest

from splitonnx.runtime.engine.layouts.block_sizes import SIZES, find_block_size, read_block_size
from splitonnx.runtime.engine.layouts.convolutions import DOMAIN


def find_elsewhere(size: int, *, wrong: float = 0.0) -> int:
    """Return the size found on a machine with blocks of ``size``, whose products are ``wrong``."""

    def run_elsewhere(model: bytes, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        kinds = {node.op_type for node in onnx.load_from_string(model).graph.node}
        if kinds == {"ReorderInput"}:
            x = feeds["x"]
            return x.reshape(-1, size, 2).transpose(0, 2, 1).reshape(x.shape)
        return np.full(3, 1.0 if kinds == {"Conv"} else 1.0 + wrong)

    return read_block_size(run_elsewhere)


def test_this_machine_has_a_block_of_a_known_size_or_none() -> None:
    assert find_block_size(onnxruntime) in (*SIZES, 0)


@pytest.mark.parametrize("size", SIZES)
def test_the_size_is_read_off_the_order_of_numbers(size: int) -> None:
    assert find_elsewhere(size) == size


def test_an_order_that_is_not_known_means_no_blocks() -> None:
    assert find_elsewhere(2) == 0


def test_a_machine_where_blocks_give_other_results_does_without() -> None:
    assert find_elsewhere(16, wrong=0.01) == 0


def test_a_runtime_without_the_operators_has_no_blocks() -> None:
    def refuse(model: bytes, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
        assert DOMAIN.encode() in model
        raise RuntimeError("no such operator")

    assert read_block_size(refuse) == 0
