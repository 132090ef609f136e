"""Checks before kernels that compute addresses: the well-formed passes, the rest is refused.

Only the checks run here, never the kernels behind them, which a bad value could end the process in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.cutting.addresses import (
    ADDRESS_CHECKS,
    check_axis,
    check_bias,
    check_boxes,
    check_columns,
    check_features,
    check_frames,
    check_matrices,
    check_places,
    check_unpooled,
    check_widths,
)
from splitonnx.partitioner.graphs.builders import NodeBuilder

Arrays = Mapping[str, np.ndarray]
Check = Callable[[NodeBuilder, ir.Node], Mapping[int, ir.Value]]


def floats(*shape: int, value: float = 1.0) -> np.ndarray:
    return np.full(shape, value, np.float32)


def whole(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def make_inputs(arrays: Arrays, *, known: bool) -> dict[str, ir.Value]:
    """Declare inputs, with their shapes or with nothing but their ranks."""
    return {
        name: ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(
                array.shape if known else [f"{name}{axis}" for axis in range(array.ndim)]
            ),
        )
        for name, array in arrays.items()
    }


def run_check(
    check: Check, kind: str, arrays: Arrays, *, known: bool = False, **attributes: Any
) -> dict[str, np.ndarray]:
    """Return each input as the kernel would get it, once the check has passed."""
    values = make_inputs(arrays, known=known)
    node = ir.node(kind, list(values.values()), attributes, name="node")
    builder = NodeBuilder("check")
    checked = {list(values)[place]: made for place, made in check(builder, node).items()}
    outputs = []
    for name, made in checked.items():
        output = builder.op("Identity", made)
        output.name, output.type = f"{name}.checked", made.type or values[name].type
        outputs.append(output)
    if not outputs:
        return dict(arrays)
    graph = ir.Graph(
        list(values.values()), outputs, nodes=builder.nodes, opset_imports={"": 20}, name="check"
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    content = ir.to_proto(ir.Model(graph, ir_version=9)).SerializeToString()
    results = onnxruntime.InferenceSession(content, options).run(None, dict(arrays))
    return dict(arrays) | dict(zip(checked, results, strict=True))


def hold_pass(check: Check, kind: str, arrays: Arrays, **settings: Any) -> None:
    found = run_check(check, kind, arrays, **settings)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def hold_refusal(check: Check, kind: str, arrays: Arrays, **settings: Any) -> None:
    with pytest.raises(Exception, match=r"out of data bounds|[Rr]eshape|indices element"):
        run_check(check, kind, arrays, **settings)


def test_places_far_away_are_reflected_to_the_same_pixel_near_the_image() -> None:
    grid = np.array([-1e6, -9.5, -3.0, 0.25, 4.5, 1e6 + 1], np.float32).reshape(1, 1, 3, 2)
    arrays = {"x": floats(1, 1, 4, 4), "grid": grid}
    found = run_check(check_places, "GridSample", arrays, padding_mode="reflection")["grid"]
    np.testing.assert_array_equal(found, np.fmod(grid, np.float32(4)))
    assert np.abs(found).max() < 4


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_place_that_is_no_number_is_refused(value: float) -> None:
    arrays = {"x": floats(1, 1, 4, 4), "grid": floats(1, 1, 1, 2, value=value)}
    hold_refusal(check_places, "GridSample", arrays, padding_mode="reflection")
    hold_pass(check_places, "GridSample", arrays, padding_mode="zeros")


def test_a_single_pixel_is_not_reflected_at_its_corners() -> None:
    arrays = {"x": floats(1, 1, 4, 1), "grid": floats(1, 1, 1, 2, value=0.5)}
    settings = {"padding_mode": "reflection", "align_corners": 1}
    hold_refusal(check_places, "GridSample", arrays, **settings)
    with pytest.raises(UnsupportedModel, match="one pixel wide"):
        run_check(check_places, "GridSample", arrays, known=True, **settings)
    hold_pass(check_places, "GridSample", {**arrays, "x": floats(1, 1, 4, 2)}, **settings)


BOXES = {"x": floats(2, 1, 6, 6), "boxes": floats(2, 4, value=5.0), "images": whole(1, 0)}


def test_boxes_near_an_image_that_there_is_pass() -> None:
    hold_pass(check_boxes, "RoiAlign", BOXES)
    hold_pass(check_boxes, "RoiAlign", BOXES, known=True, spatial_scale=0.5)


@pytest.mark.parametrize(
    "bad",
    [
        {"images": whole(0, 2)},
        {"images": whole(-3, 0)},
        {"boxes": floats(2, 4, value=1e4)},
        {"boxes": floats(2, 4, value=np.nan)},
        {"boxes": floats(2, 4, value=-np.inf)},
    ],
)
def test_boxes_far_away_or_of_no_image_are_refused(bad: Arrays) -> None:
    hold_refusal(check_boxes, "RoiAlign", {**BOXES, **bad})


def test_a_box_may_reach_further_where_the_samples_are_fixed() -> None:
    distant = {**BOXES, "boxes": floats(2, 4, value=1e4)}
    hold_pass(check_boxes, "RoiAlign", distant, sampling_ratio=2)
    hold_refusal(check_boxes, "RoiAlign", {**BOXES, "boxes": floats(2, 4, value=1e9)},
                 sampling_ratio=2)  # fmt: skip


@pytest.mark.parametrize("sized", [False, True])
def test_only_places_within_the_output_are_unpooled(sized: bool) -> None:
    last = 1 * 1 * 4 * 4 - 1
    arrays = {"x": floats(1, 1, 2, 2), "places": whole(0, 3, 8, last).reshape(1, 1, 2, 2)}
    if sized:
        arrays["shape"] = whole(1, 1, 4, 4)
    settings = {"kernel_shape": [2, 2], "strides": [2, 2]}
    hold_pass(check_unpooled, "MaxUnpool", arrays, **settings)
    beyond = {**arrays, "places": arrays["places"] + 1}
    hold_refusal(check_unpooled, "MaxUnpool", beyond, **settings)


@pytest.mark.parametrize(
    ("mode", "size", "widths", "legal"),
    [
        ("reflect", 4, (3, 3), True),
        ("reflect", 4, (4, 0), False),
        ("reflect", 4, (0, 4), False),
        ("wrap", 4, (4, 4), True),
        ("wrap", 4, (5, 0), False),
        ("edge", 1, (9, 9), True),
        ("edge", 3, (1, -3), False),
        ("constant", 2, (1, -1), True),
        ("constant", 1, (1, -1), False),
        ("reflect", 6, (3, -2), True),
        ("reflect", 5, (3, -2), False),
    ],
)
def test_no_axis_lends_more_than_is_left_of_it(
    mode: str, size: int, widths: tuple[int, int], legal: bool
) -> None:
    arrays = {"x": floats(size), "widths": whole(*widths)}
    (hold_pass if legal else hold_refusal)(check_widths, "Pad", arrays, mode=mode)


def test_widths_of_chosen_axes_are_held_against_those() -> None:
    arrays = {"x": floats(2, 9), "widths": whole(5, 5), "value": floats(1).reshape(())}
    hold_pass(check_widths, "Pad", {**arrays, "axes": whole(1)}, mode="reflect")
    hold_refusal(check_widths, "Pad", {**arrays, "axes": whole(0)}, mode="reflect")


COLUMNS = {"x": floats(1, 3 * 4, 9), "image": whole(4, 4), "block": whole(2, 2)}


def test_columns_for_every_place_of_the_block_pass() -> None:
    hold_pass(check_columns, "Col2Im", COLUMNS, known=True)
    strided = {**COLUMNS, "x": floats(1, 12, 4)}
    hold_pass(check_columns, "Col2Im", strided, known=True, strides=[2, 2])
    padded = {**COLUMNS, "x": floats(1, 12, 25)}
    hold_pass(check_columns, "Col2Im", padded, known=True, pads=[1, 1, 1, 1])


@pytest.mark.parametrize(
    "bad",
    [
        {"x": floats(1, 12, 8)},
        {"x": floats(1, 11, 9)},
        {"image": whole(5, 4)},
        {"block": whole(3, 2)},
        {"block": whole(0, 2)},
        {"block": whole(9, 9)},
    ],
)
def test_columns_that_do_not_fit_are_refused(bad: Arrays) -> None:
    hold_refusal(check_columns, "Col2Im", {**COLUMNS, **bad}, known=True)


def test_there_is_a_matrix_for_each_image() -> None:
    fitting = {"matrices": floats(2, 2, 3), "size": whole(2, 5, 4, 4)}
    hold_pass(check_matrices, "AffineGrid", fitting)
    for shape in ((1, 2, 3), (2, 3, 3), (2, 2, 4)):
        hold_refusal(check_matrices, "AffineGrid", {**fitting, "matrices": floats(*shape)})
    hold_refusal(check_matrices, "AffineGrid", {**fitting, "size": whole(2, 5, 4, 4, 4)})


@pytest.mark.parametrize(("number", "wanted"), [(0, 0), (1, 1), (-2, 1), (-3, 0)])
def test_an_axis_of_samples_is_found(number: int, wanted: int) -> None:
    arrays = {"x": floats(2, 8, 2), "length": np.array(8), "axis": np.array(number)}
    assert int(run_check(check_axis, "DFT", arrays)["axis"]) % 3 == wanted


@pytest.mark.parametrize("number", [2, -1])
def test_the_axis_of_imaginary_parts_is_refused(number: int) -> None:
    arrays = {"x": floats(2, 8, 2), "length": np.array(8), "axis": np.array(number)}
    found = int(run_check(check_axis, "DFT", arrays)["axis"])
    assert not -3 <= found < 3  # an axis that the kernel itself refuses
    with pytest.raises(UnsupportedModel, match="imaginary parts"):
        run_check(check_axis, "DFT", {"x": arrays["x"]}, axis=number, known=True)


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("known", [False, True])
def test_weights_as_wide_as_what_they_meet_pass(kind: str, gates: int, known: bool) -> None:
    arrays = {"x": floats(5, 2, 3), "w": floats(1, gates * 4, 3), "r": floats(1, gates * 4, 4)}
    hold_pass(check_features, kind, arrays, known=known, hidden_size=4)
    for name, shape in (("w", (1, gates * 4, 2)), ("w", (2, gates * 4, 3)), ("r", (1, 4, 4, 1))):
        if arrays[name].ndim == len(shape):
            bad = {**arrays, name: floats(*shape)}
            hold_refusal(check_features, kind, bad, known=known, hidden_size=4)
    hold_refusal(check_features, kind, arrays, known=known, hidden_size=5)
    hold_refusal(check_features, kind, arrays, hidden_size=4, direction="bidirectional")


@pytest.mark.parametrize(
    ("kind", "weights", "group", "filters"),
    [("Conv", (6, 2, 3, 3), 2, 6), ("ConvTranspose", (4, 3, 3, 3), 2, 6)],
)
def test_there_is_a_bias_for_each_filter(
    kind: str, weights: tuple[int, ...], group: int, filters: int
) -> None:
    arrays = {"x": floats(1, 4, 5, 5), "w": floats(*weights), "b": floats(filters)}
    hold_pass(check_bias, kind, arrays, group=group)
    hold_pass(check_bias, kind, arrays, known=True, group=group)
    hold_refusal(check_bias, kind, {**arrays, "b": floats(filters - 1)}, group=group)
    hold_refusal(check_bias, kind, {**arrays, "b": floats(filters + 1)}, known=True, group=group)


def test_a_frame_has_a_length() -> None:
    arrays = {"x": floats(1, 9, 1), "step": np.array(2), "window": floats(4), "length": np.array(4)}
    hold_pass(check_frames, "STFT", arrays)
    for length in (0, -4):
        hold_refusal(check_frames, "STFT", {**arrays, "length": np.array(length)})


def test_the_table_is_in_order() -> None:
    assert list(ADDRESS_CHECKS) == sorted(ADDRESS_CHECKS)
