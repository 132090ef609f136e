"""Rewrites of operators on images, where the onnx package's node cases do not reach.

Each rewritten operator is held against the one that it stands for, as onnx.reference evaluates it
in float64, and its gradients against finite differences of that: with a dynamic batch, and a
dynamic image size where the rewrite takes one, by the fused kernels and lowered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.gradients import differentiate
from splitonnx.partitioner.lowerings import lower
from splitonnx.partitioner.paddings import settle_paddings
from splitonnx.partitioner.rewrites import rewrite
from tests.oracles import differentiate_numerically, make_evaluator, to_double

Arrays = Mapping[str, np.ndarray]
FLOAT = TensorProto.FLOAT


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operator on ``x`` and further inputs; ``trained`` names those to differentiate to.

    ``dynamic`` are the dimensions of ``x`` that the model does not know.
    """

    kind: str
    x: tuple[int, ...]
    others: Mapping[str, np.ndarray] = field(default_factory=dict)
    trained: Sequence[str] = ("x",)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    dynamic: Sequence[int] = (0,)
    opset: int = 21


def build(case: Case) -> onnx.ModelProto:
    """Make a model of the operator alone, whose other inputs are constants if not trained."""
    names = ["x", *case.others]
    node = helper.make_node(
        case.kind,
        ["" if name.startswith("none") else name for name in names],
        ["y", *(f"y{i}" for i in range(1, case.outputs))],
        name="node",
        **case.attributes,
    )
    dims: list[int | str] = list(case.x)
    for axis in case.dynamic:
        dims[axis] = f"d{axis}"
    inputs = [helper.make_tensor_value_info("x", FLOAT, dims)]
    constants = []
    for name, array in case.others.items():
        if name in case.trained:
            inputs.append(helper.make_tensor_value_info(name, FLOAT, array.shape))
        elif not name.startswith("none"):
            constants.append(numpy_helper.from_array(array, name))
    outputs = [helper.make_empty_tensor_value_info("y")]
    graph = helper.make_graph([node], "case", inputs, outputs, constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=10
    )
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def draw(case: Case) -> dict[str, np.ndarray]:
    """Draw ``x``, without ties, and give what is trained beside it."""
    random = np.random.default_rng(4)
    size = int(np.prod(case.x))
    values = (random.permutation(size) + random.uniform(0.1, 0.4, size)) * 4 / size - 2
    feeds = {"x": values.reshape(case.x).astype(np.float32)}
    return feeds | {n: a for n, a in case.others.items() if n in case.trained and n != "x"}


def attach(model: ir.Model) -> ir.Model:
    """Add the loss: the sum of the output times a tensor ``r``."""
    y = model.graph.outputs[0]
    shape = None if y.shape is None else ir.Shape(y.shape.dims)
    r = ir.Value(name="r", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    model.graph.inputs.append(r)
    product = ir.node("Mul", [y, r], name="product")
    product.outputs[0].name = "product_value"
    total = ir.node("ReduceSum", [product.outputs[0]], {"keepdims": 0}, name="total")
    total.outputs[0].name = "loss"
    total.outputs[0].type, total.outputs[0].shape = r.type, ir.Shape([])
    model.graph.extend([product, total])
    model.graph.outputs.append(total.outputs[0])
    return model


def run(model: ir.Model, feeds: Arrays) -> dict[str, np.ndarray]:
    used = {value.name for value in model.graph.inputs}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    results = session.run(None, {n: a for n, a in feeds.items() if n in used})
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, results, strict=True))


def hold(case: Case, *, oracle: str = "both") -> set[str]:
    """Check values and gradients of the rewritten operator; name the operators it became.

    The oracle is onnx.reference, or where that is wrong ONNX Runtime's kernel, whose differences
    are wide, as they are float32: for operators linear in each input.  ``both`` holds the two to
    the same values.
    """
    original, feeds = build(case), draw(case)
    evaluator = None if oracle == "kernel" else make_evaluator(to_double(original))
    wide = {name: array.astype(np.float64) for name, array in feeds.items()}

    def evaluate() -> np.ndarray:
        if evaluator is None:
            narrow = {name: array.astype(np.float32) for name, array in wide.items()}
            return run(ir.from_proto(original), narrow)["y"].astype(np.float64)
        results = evaluator.run(None, wide)
        assert isinstance(results, list)
        return np.asarray(results[0])

    settled = ir.from_proto(original)
    settle_paddings(settled.graph)
    expected = evaluate()
    if oracle == "both":
        kernels = run(settled, feeds)["y"]
        np.testing.assert_allclose(kernels, expected, rtol=1e-4, atol=1e-4)
    factors = np.random.default_rng(6).uniform(0.5, 1.5, expected.shape).astype(np.float32)

    model = settled.clone()
    ShapeInferencePass(check_type=True, strict_mode=False, data_prop=True)(model)
    rewrite(model, case.trained)
    used = {node.op_type for node in model.graph}
    joint = differentiate(attach(model), list(case.trained), "loss")
    lower(joint.graph, defective=True)
    lowered = joint.clone()
    lower(lowered.graph)
    for found in (run(joint, {**feeds, "r": factors}), run(lowered, {**feeds, "r": factors})):
        assert found["y"].shape == expected.shape
        np.testing.assert_allclose(found["y"], expected, rtol=1e-4, atol=1e-4)
        for name in case.trained:
            gradient = found[f"{name}_grad"]
            assert gradient.shape == feeds[name].shape
            scale = max(1.0, float(np.abs(gradient).max()))
            slopes = differentiate_numerically(
                lambda: float((evaluate() * factors).sum()),
                wide[name],
                entries=5,
                step=0.01 if oracle == "kernel" else 1e-5,
            )
            for index, slope in slopes:
                assert abs(gradient[index] - slope) <= 1e-3 * scale, (name, index)
    return used


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def whole(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


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


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
@pytest.mark.parametrize("dynamic", [(0,), (0, 1), (0, 1, 2, 3)])
def test_depth_to_space(mode: str, dynamic: Sequence[int]) -> None:
    attributes = {"blocksize": 2, "mode": mode}
    hold(Case(kind="DepthToSpace", x=(2, 8, 2, 3), attributes=attributes, dynamic=dynamic))


@pytest.mark.parametrize("dynamic", [(0,), (0, 1, 2, 3)])
def test_space_to_depth(dynamic: Sequence[int]) -> None:
    hold(Case(kind="SpaceToDepth", x=(2, 2, 4, 6), attributes={"blocksize": 2}, dynamic=dynamic))


def resize(x: tuple[int, ...], *, dynamic: Sequence[int] = (0,), **settings: Any) -> Case:
    """A Resize by scales, sizes or a region; the rest are attributes."""
    scales = settings.pop("scales", None)
    sizes = settings.pop("sizes", None)
    others = {
        "roi": settings.pop("roi", floats()),
        "scales" if scales else "none_scales": floats(*(scales or [])),
    }
    if sizes:
        others["sizes"] = whole(*sizes)
    return Case(kind="Resize", x=x, others=others, attributes=settings, dynamic=dynamic, opset=19)


@pytest.mark.parametrize("nearest", ["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
@pytest.mark.parametrize(
    "coordinates", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]
)
@pytest.mark.parametrize("sizes", [(8, 6), (5, 4), (2, 1)])
def test_resize_to_the_nearest(nearest: str, coordinates: str, sizes: tuple[int, int]) -> None:
    case = resize(
        (2, 3, 4, 3), sizes=[2, 3, *sizes], nearest_mode=nearest,
        coordinate_transformation_mode=coordinates,
    )  # fmt: skip
    hold(case)


@pytest.mark.parametrize("antialias", [0, 1])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("sizes", [(8, 6), (3, 5), (1, 7)])
def test_resize_by_weights(mode: str, antialias: int, sizes: tuple[int, int]) -> None:
    case = resize(
        (2, 3, 6, 5), sizes=[2, 3, *sizes], mode=mode, antialias=antialias,
        coordinate_transformation_mode="half_pixel",
    )  # fmt: skip
    assert "MatMul" in hold(case)


@pytest.mark.parametrize("exclude", [0, 1])
@pytest.mark.parametrize("coordinates", ["align_corners", "asymmetric", "pytorch_half_pixel"])
def test_resize_by_cubic_weights_of_another_sharpness(coordinates: str, exclude: int) -> None:
    case = resize(
        (2, 1, 4, 4), sizes=[2, 1, 6, 3], mode="cubic", cubic_coeff_a=-0.5,
        coordinate_transformation_mode=coordinates, exclude_outside=exclude,
    )  # fmt: skip
    hold(case)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_resize_of_a_region_that_reaches_beyond_the_image(mode: str) -> None:
    region = floats(0, 0, -0.2, 0.1, 1, 1, 1, 1.4)
    case = resize(
        (2, 1, 4, 4), sizes=[2, 1, 3, 5], mode=mode, roi=region,
        coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=2.5,
    )  # fmt: skip
    hold(case)


@pytest.mark.parametrize("times", [1.0, 2.0, 3.0])
def test_resize_by_whole_factors_takes_any_image_size(times: float) -> None:
    case = resize(
        (2, 3, 4, 3), dynamic=(0, 1, 2, 3), scales=[1, 1, times, 2], mode="nearest",
        coordinate_transformation_mode="asymmetric", nearest_mode="floor",
    )  # fmt: skip
    assert "Expand" in hold(case)


def test_resize_of_volumes() -> None:
    case = resize((2, 1, 3, 4, 2), scales=[1, 1, 2, 1.5, 2], mode="linear")
    hold(case)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("dynamic", [(0,), (0, 1, 2, 3)])
@pytest.mark.parametrize(
    ("pads", "axes"),
    [
        ([0, 0, 1, 2, 0, 0, 2, 0], None),
        ([0, 0, -1, 1, 0, 0, 1, -2], None),
        ([1, 2, 0, 1], [-1, 2]),
        ([-1, -1], [3]),
    ],
)
def test_padding(
    mode: str, dynamic: Sequence[int], pads: list[int], axes: list[int] | None
) -> None:
    others = {"pads": whole(*pads), "value": np.array(1.5, np.float32)}
    if axes is not None:
        others["axes"] = whole(*axes)
    case = Case(
        kind="Pad",
        x=(2, 2, 4, 5),
        others=others,
        attributes={"mode": mode},
        dynamic=dynamic,
        opset=19,
    )
    negative = min(pads) < 0
    hold(case, oracle="kernel" if negative else "both")


def test_padding_with_a_trained_value() -> None:
    others = {"pads": whole(1, 2, 0, 1), "value": floats(1.5), "axes": whole(2, 3)}
    hold(Case(kind="Pad", x=(2, 2, 4, 5), others=others, trained=("x", "value")))


@pytest.mark.parametrize("dynamic", [(0,), (0, 1, 2, 3)])
@pytest.mark.parametrize("sizes", [(3, 8), (7, 4), (2, 2)])
def test_center_crop_pad(sizes: tuple[int, int], dynamic: Sequence[int]) -> None:
    case = Case(
        kind="CenterCropPad", x=(2, 2, 4, 5), others={"sizes": whole(*sizes)},
        attributes={"axes": [2, -1]}, dynamic=dynamic,
    )  # fmt: skip
    hold(case)


@pytest.mark.parametrize("x", [(2, 3, 40), (2, 3, 5, 4, 6)])
def test_convolutions_in_groups_along_lines_and_volumes(x: tuple[int, ...]) -> None:
    """The fused gradient of these writes beyond its output, and breaks the process."""
    kernel = [2] * (len(x) - 2)
    others = {"w": weights(6, 1, *kernel)}
    attributes = {"group": 3, "strides": kernel}
    case = Case(kind="Conv", x=x, others=others, trained=("x", "w"), attributes=attributes)
    hold(case)


POOLS: list[dict[str, Any]] = [
    {"kernel_shape": [2, 2]},
    {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [1, 0, 1, 1]},
    {"kernel_shape": [2, 3], "strides": [2, 3], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1},
    {"kernel_shape": [2, 2], "dilations": [2, 3], "strides": [1, 2], "pads": [1, 1, 0, 1]},
]


@pytest.mark.parametrize("attributes", POOLS)
@pytest.mark.parametrize("dynamic", [(0,), (0, 2, 3)])
def test_max_pool(attributes: dict[str, Any], dynamic: Sequence[int]) -> None:
    hold(Case(kind="MaxPool", x=(2, 2, 7, 8), attributes=attributes, dynamic=dynamic))


@pytest.mark.parametrize("attributes", POOLS)
def test_max_pool_of_lines(attributes: dict[str, Any]) -> None:
    rank = 2
    line = {
        name: [values[0]] if name != "pads" else [values[0], values[rank]]
        for name, values in attributes.items()
        if name != "ceil_mode"
    }
    hold(Case(kind="MaxPool", x=(2, 2, 9), attributes=line))


def test_max_pool_with_indices_down_the_columns() -> None:
    attributes = {"kernel_shape": [2, 2], "strides": [2, 2], "storage_order": 1}
    hold(Case(kind="MaxPool", x=(2, 2, 6, 6), attributes=attributes, outputs=2))


def test_max_pool_of_volumes() -> None:
    attributes = {"kernel_shape": [2, 2, 2], "strides": [2, 1, 2], "pads": [1, 0, 0, 1, 0, 0]}
    hold(Case(kind="MaxPool", x=(2, 2, 4, 4, 5), attributes=attributes))


@pytest.mark.parametrize("attributes", POOLS)
@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("dynamic", [(0,), (0, 2, 3)])
def test_average_pool(attributes: dict[str, Any], include: int, dynamic: Sequence[int]) -> None:
    attributes = {**attributes, "count_include_pad": include}
    if len(dynamic) > 1 and "ceil_mode" in attributes:
        pytest.skip("which windows there are depends on the image's size")
    case = Case(kind="AveragePool", x=(2, 2, 7, 8), attributes=attributes, dynamic=dynamic)
    hold(case)


@pytest.mark.parametrize("attributes", POOLS)
@pytest.mark.parametrize("power", [1, 2, 3])
def test_lp_pool(attributes: dict[str, Any], power: int) -> None:
    attributes = {**attributes, "p": power}
    ragged = "ceil_mode" in attributes  # onnx.reference scales what ceil_mode adds
    case = Case(kind="LpPool", x=(2, 2, 7, 8), attributes=attributes)
    hold(case, oracle="kernel" if ragged else "both")


@pytest.mark.parametrize("kind", ["GlobalAveragePool", "GlobalMaxPool"])
@pytest.mark.parametrize("x", [(2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 3, 4)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_global_pools(kind: str, x: tuple[int, ...], dynamic: bool) -> None:
    case = Case(kind=kind, x=x, dynamic=range(len(x)) if dynamic else [0])
    hold(case, oracle="both" if len(x) == 4 else "kernel")  # onnx.reference knows only images


@pytest.mark.parametrize("size", [1, 2, 5])
def test_local_response_normalization(size: int) -> None:
    attributes = {"size": size, "alpha": 0.5, "beta": 0.6, "bias": 1.5}
    case = Case(kind="LRN", x=(4, 4, 3, 2), attributes=attributes)
    # onnx.reference takes the number of images for that of channels; the kernel wants odd sizes
    hold(case, oracle="both" if size % 2 else "reference")


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("x", [(1, 2, 7, 8), (1, 2, 6, 9)])
@pytest.mark.parametrize("kind", ["Conv", "MaxPool"])
def test_automatic_padding_of_any_image_size(kind: str, x: tuple[int, ...], mode: str) -> None:
    attributes: dict[str, Any] = {"auto_pad": mode, "strides": [2, 3], "kernel_shape": [3, 4]}
    others = {"w": weights(3, 2, 3, 4)} if kind == "Conv" else {}
    case = Case(
        kind=kind, x=x, others=others, trained=("x", *others), attributes=attributes,
        dynamic=(0, 2, 3),
    )  # fmt: skip
    hold(case, oracle="kernel")  # onnx.reference rounds SAME_LOWER down


@pytest.mark.parametrize("shape", [None, (2, 2, 7, 7)])
@pytest.mark.parametrize("dynamic", [(0,), (0, 1, 2, 3)])
def test_max_unpool(shape: tuple[int, ...] | None, dynamic: Sequence[int]) -> None:
    corners = np.array([0, 4, 14, 22], np.int64).reshape(1, 1, 2, 2)
    places = corners + 36 * np.arange(4).reshape(2, 2, 1, 1)
    others = {"places": places} | ({"shape": whole(*shape)} if shape else {})
    attributes = {"kernel_shape": [3, 3], "strides": [3, 3]}
    case = Case(
        kind="MaxUnpool", x=(2, 2, 2, 2), others=others, attributes=attributes, dynamic=dynamic
    )
    hold(case, oracle="reference" if shape else "both")


@pytest.mark.parametrize("power", [1, 2, 3])
def test_global_lp_pool(power: int) -> None:
    case = Case(kind="GlobalLpPool", x=(2, 3, 4, 5), attributes={"p": power}, dynamic=(0, 2, 3))
    hold(case, oracle="kernel")  # onnx.reference has none


@pytest.mark.parametrize("kernel", [(2, 2), (3, 2)])
def test_columns_to_an_image(kernel: tuple[int, int]) -> None:
    attributes = {"pads": [1, 0, 1, 1], "strides": [1, 2], "dilations": [1, 1]}
    others = {"image": whole(5, 6), "block": whole(*kernel)}
    steps = (5 + 2 - kernel[0] + 1) * ((6 + 1 - kernel[1]) // 2 + 1)
    x = (2, 3 * kernel[0] * kernel[1], steps)
    case = Case(kind="Col2Im", x=x, others=others, attributes=attributes)
    assert "Conv" in hold(case)


def draw_grid(image: Sequence[int], places: Sequence[int], *, corners: bool) -> np.ndarray:
    """Draw places inside of the image and around it, away from where a gradient jumps."""
    random = np.random.default_rng(8)
    lines = []
    for n in reversed(image):
        pixel = random.integers(-3, n + 3, (2, *places)) + random.uniform(0.15, 0.4, (2, *places))
        lines.append(pixel / (n - 1) * 2 - 1 if corners else (2 * pixel + 1) / n - 1)
    return np.stack(lines, axis=-1).astype(np.float32)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("dynamic", [(0,), (0, 1, 2, 3)])
def test_grid_sample(mode: str, padding: str, corners: bool, dynamic: Sequence[int]) -> None:
    trained = ("x",) if mode == "nearest" else ("x", "grid")
    attributes = {"mode": mode, "padding_mode": padding, "align_corners": int(corners)}
    case = Case(
        kind="GridSample", x=(2, 3, 4, 5),
        others={"grid": draw_grid((4, 5), (3, 4), corners=corners)}, trained=trained,
        attributes=attributes, dynamic=dynamic,
    )  # fmt: skip
    hold(case, oracle="kernel")  # onnx.reference places samples in float32


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_grid_sample_of_volumes(padding: str) -> None:
    others = {"grid": draw_grid((3, 4, 5), (2, 2, 2), corners=False)}
    case = Case(
        kind="GridSample", x=(2, 2, 3, 4, 5), others=others, trained=("x", "grid"),
        attributes={"padding_mode": padding},
    )  # fmt: skip
    hold(case, oracle="kernel")


@pytest.mark.parametrize("corners", [0, 1])
@pytest.mark.parametrize("sizes", [(2, 1, 3, 4), (2, 1, 2, 3, 4)])
def test_affine_grid(sizes: tuple[int, ...], corners: int) -> None:
    rank = len(sizes) - 2
    case = Case(
        kind="AffineGrid", x=(2, rank, rank + 1), others={"size": whole(*sizes)},
        attributes={"align_corners": corners},
    )  # fmt: skip
    hold(case, oracle="kernel")


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("coordinates", ["half_pixel", "output_half_pixel"])
@pytest.mark.parametrize("dynamic", [(0,), (0, 2, 3)])
def test_roi_align(mode: str, ratio: int, coordinates: str, dynamic: Sequence[int]) -> None:
    rois = np.array([[1, 0, 9, 7], [-3, 2, 4, 20], [0.3, 0.2, 2.1, 1.9]], np.float32)
    attributes = {
        "mode": mode, "sampling_ratio": ratio, "coordinate_transformation_mode": coordinates,
        "output_height": 2, "output_width": 3, "spatial_scale": 0.6,
    }  # fmt: skip
    case = Case(
        kind="RoiAlign", x=(2, 2, 5, 6), others={"rois": rois, "images": whole(1, 0, 1)},
        attributes=attributes, dynamic=dynamic,
    )  # fmt: skip
    hold(case, oracle="kernel")


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("dynamic", [(0,), (0, 2, 3)])
def test_max_roi_pool(scale: float, dynamic: Sequence[int]) -> None:
    rois = np.array(
        [[1, 0, 1, 4, 3], [0, 2, 2, 5, 4], [1, 1, 1, 1, 1], [0, 3, 3, 9, 8]], np.float32
    )
    attributes = {"pooled_shape": [2, 3], "spatial_scale": scale}
    case = Case(
        kind="MaxRoiPool", x=(2, 2, 5, 6), others={"rois": rois}, attributes=attributes,
        dynamic=dynamic,
    )  # fmt: skip
    hold(case, oracle="kernel")


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(
    "coordinates", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]
)
def test_resize_of_any_image_size(mode: str, coordinates: str, sized: bool) -> None:
    settings: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": coordinates}
    settings |= {"sizes": [2, 3, 7, 4]} if sized else {"scales": [1, 1, 2, 1.5]}
    if coordinates == "align_corners" and not sized:
        settings["scales"] = [1, 1, 2, 1.25]
    hold(resize((2, 3, 5, 4), dynamic=(0, 1, 2, 3), **settings))


def test_resize_by_cubic_weights_wants_a_fixed_image_size() -> None:
    case = resize((2, 3, 5, 4), dynamic=(0, 2, 3), mode="cubic", scales=[1, 1, 2, 2])
    with pytest.raises(UnsupportedModel, match=r"'node' \(Resize\): the size of 'x' along axis 2"):
        hold(case)
