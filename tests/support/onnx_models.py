"""The networks that the onnx package ships, made ready to train: their weights drawn anew.

The ``light_*`` networks keep their graphs but not their weights, which a ConstantOfShape makes of
one number each; the ``pytorch-*`` ones hold theirs as initializers or make them in the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
LIGHT = tuple(sorted(path.stem for path in (DATA / "light").glob("light_*.onnx")))

_LAYERS_WITHOUT_WEIGHTS = """
    AvgPool1d AvgPool1d_stride AvgPool2d AvgPool2d_stride AvgPool3d AvgPool3d_stride
    AvgPool3d_stride1_pad0_gpu_input ConstantPad2d ELU GLU GLU_dim LeakyReLU
    LeakyReLU_with_negval LogSoftmax MaxPool1d MaxPool1d_stride
    MaxPool1d_stride_padding_dilation MaxPool2d MaxPool2d_stride_padding_dilation MaxPool3d
    MaxPool3d_stride MaxPool3d_stride_padding PixelShuffle ReLU ReflectionPad2d
    ReplicationPad2d SELU Sigmoid Softmax Softmin Softplus Softsign Tanh ZeroPad2d
    log_softmax_dim3 log_softmax_lastdim softmax_functional_dim3 softmax_lastdim
"""
_FUNCTIONS_WITHOUT_WEIGHTS = """
    add_broadcast add_size1_broadcast add_size1_right_broadcast
    add_size1_singleton_broadcast addmm basic chunk clip concat2 exp flatten index max
    maxpool min pad permute2 pow reduced_mean reduced_mean_keepdim reduced_sum
    reduced_sum_keepdim repeat repeat_dim_overflow selu sqrt symbolic_override_nested view
"""
UNTRAINED: Mapping[str, str] = {
    **{f"test_{name}": "holds no weights" for name in _LAYERS_WITHOUT_WEIGHTS.split()},
    **{f"test_operator_{name}": "holds no weights" for name in _FUNCTIONS_WITHOUT_WEIGHTS.split()},
    "test_operator_addconstant": "adds a single literal, which is not a parameter",
    "test_operator_mm": "adds a single literal, which is not a parameter",
    "test_operator_non_float_params": "adds integers, which have no gradient",
}
"""Case of ``pytorch-converted`` or ``pytorch-operator`` -> why there is nothing in it to train.

All others are trained.
"""


def list_cases(folder: str) -> list[str]:
    """List the cases of ``pytorch-converted`` or ``pytorch-operator``."""
    return sorted(path.parent.name for path in (DATA / folder).glob("*/model.onnx"))


def load_case(folder: str, name: str) -> onnx.ModelProto:
    """Load the model of a case; a weight of 1, 2, 3, 4 is scaled, since it passes for a grid."""
    model = onnx.load(DATA / folder / name / "model.onnx")
    if name == "test_operator_params":
        (weight,) = model.graph.initializer
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) / 3, weight.name))
    return model


def load_light(name: str, *, image: int | None = None, seed: int = 1) -> onnx.ModelProto:
    """Load a light network with weights drawn anew, for square images of ``image`` pixels.

    Convolutions get He's standard deviation and matrices half of it, as max pooling has let values
    grow on their way; scales and variances lie about 1, offsets and means about 0.  A network whose
    classifier fixes the size of its images takes no other ``image``.
    """
    model = onnx.load(DATA / "light" / f"{name}.onnx")
    random = np.random.default_rng(seed)
    _draw_weights(model.graph, random)
    if image is not None:
        _resize(model, image)
    return model


def draw_inputs(model: onnx.ModelProto, samples: int = 1, seed: int = 7) -> dict[str, np.ndarray]:
    """Draw data for the inputs of a model that are not initializers, ``samples`` times a batch."""
    random = np.random.default_rng(seed)
    given = {tensor.name for tensor in model.graph.initializer}
    data = {}
    for value in model.graph.input:
        if value.name not in given:
            dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            shape = [dims[0] * samples, *dims[1:]] if dims else [samples]
            data[value.name] = random.standard_normal(shape, np.float32)
    return data


def _draw_weights(graph: onnx.GraphProto, random: np.random.Generator) -> None:
    """Put drawn initializers in the place of ConstantOfShape nodes."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    calm = any(node.op_type == "Sum" for node in graph.node)  # sums would grow block by block
    makers = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "ConstantOfShape" and node.input[0] in constants
    }
    uses = _map_uses(graph)
    for name, node in makers.items():
        shape = numpy_helper.to_array(constants[node.input[0]]).tolist()
        values = _draw(random, shape, uses[name]).astype(np.float32)
        if calm and uses[name] == ("BatchNormalization", 4):
            values *= 4
        graph.initializer.append(numpy_helper.from_array(values, name))
        graph.node.remove(node)
    shapes = {node.input[0] for node in makers.values()}
    still = {name for node in graph.node for name in node.input}
    for field in (graph.initializer, graph.input):
        for entry in [entry for entry in field if entry.name in shapes - still]:
            field.remove(entry)


def _map_uses(graph: onnx.GraphProto) -> Mapping[str, tuple[str, int]]:
    """Map each value to the operator that reads it, beyond reshaping, and at which place."""
    uses: dict[str, tuple[str, int]] = {}
    for node in reversed(graph.node):
        for place, name in enumerate(node.input):
            through = node.op_type in ("Unsqueeze", "Reshape") and place == 0
            passed = uses.get(node.output[0]) if through else None
            uses[name] = passed or (node.op_type, place)
    return uses


def _draw(random: np.random.Generator, shape: Sequence[int], use: tuple[str, int]) -> np.ndarray:
    noise = random.standard_normal(shape)
    if use in (("BatchNormalization", 1), ("BatchNormalization", 4), ("Mul", 0), ("Mul", 1)):
        return np.maximum(1 + 0.1 * noise, 0.5)
    result: np.ndarray = 0.1 * noise
    if len(shape) > 1:
        fan = int(np.prod(shape[1:])) if use[0] == "Conv" else 4 * shape[-1]
        result = noise * np.sqrt(2 / fan)
    return result


def _resize(model: onnx.ModelProto, image: int) -> None:
    """Give the images another size and forget what was inferred from the old one."""
    given = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name not in given and len(dims) == 4:
            dims[2].dim_value = dims[3].dim_value = image
    del model.graph.value_info[:]
