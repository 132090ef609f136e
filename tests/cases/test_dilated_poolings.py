"""A pooling with automatic padding and dilations is held against the standard.

ONNX Runtime pads such a pooling as if it had no dilations.
"""

from __future__ import annotations

import onnx
import pytest

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.cutting.conformance.dataflow import NotRun
from splitonnx.partitioner.partitions import cut
from tests.support.nets import FLOAT, Arrays, Net

EXPECTATIONS = "splitonnx.partitioner.cutting.conformance.expectations"


def build_pooling(kind: str, mode: str, ending: str) -> onnx.ModelProto:
    """Build a pooling with dilations, which ONNX Runtime pads as if there were none."""
    net = Net(opset=19)
    net.op("Conv", "x", net.weight("w", 2, 3, 1, 1), out="c", kernel_shape=[1, 1])
    net.op(kind, "c", out="p", kernel_shape=[2, 2], dilations=[2, 2], auto_pad=mode)
    dims = [32] if ending == "Flatten" else [2, 1, 1]
    return net.finish({"x": (FLOAT, ["N", 3, 4, 4])}, net.op(ending, "p", out="y"), *dims)


@pytest.mark.parametrize("ending", ["Flatten", "GlobalAveragePool"])
@pytest.mark.parametrize("mode", ["SAME_LOWER", "SAME_UPPER"])
@pytest.mark.parametrize("kind", ["AveragePool", "LpPool", "MaxPool"])
def test_a_pooling_with_dilations_is_held_against_the_standard(
    kind: str, mode: str, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    cut(build_pooling(kind, mode, ending), at="c", loss="mse", check=True)
    extent = "in sizes or infinities" if ending == "Flatten" else "by "
    assert f"onnx's reference evaluator and ONNX Runtime differ {extent}" in caplog.text


def test_sizes_that_no_file_declares_are_not_laid_on_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> list[Arrays]:
        raise NotRun("too slow")

    monkeypatch.setattr(f"{EXPECTATIONS}.run_reference", refuse)
    model = build_pooling("MaxPool", "SAME_LOWER", "Flatten")
    del model.graph.output[0].type.tensor_type.shape.dim[1]
    model.graph.output[0].type.tensor_type.shape.dim.add()
    with pytest.raises(UnsupportedModel) as caught:
        cut(model, at="c", loss="mse", check=True)
    assert str(caught.value) == (
        "output 'y' of the model: by the ONNX standard it has the sizes ['?', 32], but it has "
        "[2, 18] when ONNX Runtime runs it; export it again with other operators or with explicit "
        "sizes and padding"
    )
