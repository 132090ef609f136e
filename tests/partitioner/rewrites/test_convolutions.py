"""Convolutions, transposed ones, and columns put back into an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import pytest

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.reports.checks import check
from tests.support.images import Case, hold, weights, whole
from tests.support.nets import FLOAT, Net


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"strides": [2, 2]},
        {"strides": [2, 3], "pads": [1, 0, 2, 1]},
        {"strides": [3, 2], "output_padding": [2, 1]},
        {"strides": [2, 2], "dilations": [2, 3], "pads": [1, 2, 0, 1]},
        {"strides": [1, 1], "dilations": [2, 1], "pads": [2, 1, 2, 1]},
        {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"strides": [2, 1], "auto_pad": "SAME_LOWER"},
        {"strides": [4, 4]},
    ],
)
@pytest.mark.parametrize("dynamic", [(0,), (0, 2, 3)])
def test_a_transposed_convolution(attributes: dict[str, Any], dynamic: Sequence[int]) -> None:
    others = {"w": weights(3, 2, 3, 2), "b": weights(2)}
    case = Case(
        kind="ConvTranspose", x=(2, 3, 3, 4), others=others, trained=("x", "w", "b"),
        attributes=attributes, dynamic=dynamic,
    )  # fmt: skip
    assert "Conv" in hold(case)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_transposed_convolution_in_groups(channels: int) -> None:
    attributes = {"group": 4 // channels, "strides": [2], "pads": [1, 1], "output_padding": [1]}
    case = Case(
        kind="ConvTranspose", x=(2, 4, 5), others={"w": weights(4, 3, 3)}, trained=("x", "w"),
        attributes=attributes,
    )  # fmt: skip
    hold(case, oracle="kernel")


def test_a_transposed_convolution_of_volumes_that_hits_a_given_shape() -> None:
    attributes = {"strides": [2, 2, 2], "output_shape": [6, 5, 7]}
    case = Case(
        kind="ConvTranspose", x=(2, 2, 3, 2, 3), others={"w": weights(2, 2, 3, 2, 2)},
        trained=("x", "w"), attributes=attributes,
    )  # fmt: skip
    hold(case, oracle="kernel")


@pytest.mark.parametrize("x", [(2, 3, 40), (2, 3, 5, 4, 6)])
def test_convolutions_in_groups_along_lines_and_volumes(x: tuple[int, ...]) -> None:
    """The fused gradient of these writes beyond its output, and breaks the process."""
    kernel = [2] * (len(x) - 2)
    others = {"w": weights(6, 1, *kernel)}
    attributes = {"group": 3, "strides": kernel}
    case = Case(kind="Conv", x=x, others=others, trained=("x", "w"), attributes=attributes)
    hold(case)


@pytest.mark.parametrize("kernel", [(2, 2), (3, 2)])
def test_columns_to_an_image(kernel: tuple[int, int]) -> None:
    attributes = {"pads": [1, 0, 1, 1], "strides": [1, 2], "dilations": [1, 1]}
    others = {"image": whole(5, 6), "block": whole(*kernel)}
    steps = (5 + 2 - kernel[0] + 1) * ((6 + 1 - kernel[1]) // 2 + 1)
    x = (2, 3 * kernel[0] * kernel[1], steps)
    case = Case(kind="Col2Im", x=x, others=others, attributes=attributes)
    assert "Conv" in hold(case)


@pytest.mark.parametrize("name", ["strides", "dilations", "output_padding"])
def test_an_empty_list_of_a_transposed_convolution_is_refused(name: str) -> None:
    net = Net()
    y = net.op("ConvTranspose", "x", net.weight("w", 2, 3, 2, 2), out="y")
    model = net.finish({"x": (FLOAT, ["N", 2, 4, 4])}, net.op("Flatten", y, out="flat"), 75)
    empty = onnx.AttributeProto(name=name, type=onnx.AttributeProto.INTS)
    model.graph.node[0].attribute.append(empty)
    del model.graph.value_info[:]
    with pytest.raises(UnsupportedModel, match=f"ConvTranspose.*its {name} has 0 numbers"):
        check(model)
