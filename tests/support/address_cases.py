"""Values that kernels of ONNX Runtime compute addresses from, as wires of a server's part.

Each model adds up what the operator gives, and multiplies it with what a layer at the client gave.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.support.zoo import FLOAT, INT64, Arrays, Net

BOOL, INT32 = TensorProto.BOOL, TensorProto.INT32
Dims = list[int | str]


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """``inputs`` of the operator: a name of data with its type and dimensions, or a constant.

    ``bad`` replaces some of the ``good`` data.
    """

    operator: str
    inputs: Mapping[str, tuple[int, Dims] | np.ndarray]
    good: Arrays
    bad: Arrays
    attributes: Mapping[str, object]
    end: str = "StageFailed"
    opset: int = 20

    def build(self) -> onnx.ModelProto:
        """Build the model."""
        net = Net()
        net.opset = self.opset
        value = net.op("MatMul", "x", net.weight("w1", 4, 6), out="h")
        value = net.op("ReduceSum", value, out="felt")
        names = [
            net.constant(name, given) if name and isinstance(given, np.ndarray) else name
            for name, given in self.inputs.items()
        ]
        made = net.op(self.operator, *names, out="made", **self.attributes)
        if self.operator == "Loop":
            net.nodes[-1].output.append("kept")
        made = net.op("Cast", made, out="number", to=FLOAT)
        made = net.op("ReduceSum", made, out="total", keepdims=0)
        value = net.op("Mul", value, made, out="product")
        output = net.op("MatMul", value, net.weight("w2", 1, 4), out="scores")
        data = {name: given for name, given in self.inputs.items() if isinstance(given, tuple)}
        return net.finish({"x": (FLOAT, ["N", 4]), **data}, output, 4)

    @property
    def at(self) -> tuple[str, ...]:
        """Where the model is cut: the server gets all of the operator's data."""
        data = [name for name, given in self.inputs.items() if isinstance(given, tuple)]
        return ("h", *data)


def kernel(
    operator: str,
    inputs: Mapping[str, tuple[int, Dims] | np.ndarray],
    good: Arrays,
    bad: Arrays,
    end: str = "StageFailed",
    **attributes: object,
) -> KernelCase:
    felt = {"h": np.ones((1, 6), np.float32)}
    return KernelCase(operator=operator, inputs=inputs, good={**felt, **good},
                  bad={**felt, **good, **bad}, end=end, attributes=attributes)  # fmt: skip


def floats(*shape: int, value: float = 1.0) -> np.ndarray:
    return np.full(shape, value, np.float32)


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


_IMAGE: tuple[int, Dims] = (FLOAT, [1, 1, 4, 4])
_OPEN: tuple[int, Dims] = (FLOAT, ["B", 1, "H", "W"])
_PLACES: tuple[int, Dims] = (FLOAT, [1, 2, 2, 2])
_NUMBERS: tuple[int, Dims] = (INT64, ["R"])


def _grid(value: float, **attributes: object) -> KernelCase:
    return kernel(
        "GridSample", {"image": _IMAGE, "grid": _PLACES},
        {"image": floats(1, 1, 4, 4), "grid": floats(1, 2, 2, 2, value=0.5)},
        {"grid": floats(1, 2, 2, 2, value=value)},
        "done" if np.isfinite(value) else "StageFailed", padding_mode="reflection", **attributes,
    )  # fmt: skip


def _box(**bad: np.ndarray) -> KernelCase:
    return kernel(
        "RoiAlign", {"image": _IMAGE, "boxes": (FLOAT, ["R", 4]), "of": _NUMBERS},
        {"image": floats(1, 1, 4, 4), "boxes": np.array([[0, 0, 2, 2]], np.float32),
         "of": integers(0)},
        bad, output_height=2, output_width=2,
    )  # fmt: skip


def _pad(mode: str, bad: tuple[int, int]) -> KernelCase:
    return kernel(
        "Pad", {"row": (FLOAT, [4]), "widths": (INT64, [2])},
        {"row": floats(4), "widths": integers(1, 1)}, {"widths": integers(*bad)}, mode=mode,
    )  # fmt: skip


def _columns(columns: int = 9, image: int = 4, block: int = 2) -> KernelCase:
    return kernel(
        "Col2Im", {"rows": (FLOAT, [1, 4, "L"]), "image": (INT64, [2]), "block": (INT64, [2])},
        {"rows": floats(1, 4, 9), "image": integers(4, 4), "block": integers(2, 2)},
        {"rows": floats(1, 4, columns), "image": integers(image, image),
         "block": integers(block, block)},
    )  # fmt: skip


def _division_in_a_loop() -> KernelCase:
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_in"], ["go_out"]),
            helper.make_node("Div", ["carried", "divisor_kept"], ["carried_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("number", INT64, []),
            helper.make_tensor_value_info("go_in", BOOL, []),
            helper.make_tensor_value_info("carried", INT64, [1]),
            helper.make_tensor_value_info("divisor_kept", INT64, [1]),
        ],
        [
            helper.make_tensor_value_info("go_out", BOOL, []),
            helper.make_tensor_value_info("carried_out", INT64, [1]),
            helper.make_tensor_value_info("divisor_out", INT64, [1]),
        ],
    )
    body.node.append(helper.make_node("Identity", ["divisor_kept"], ["divisor_out"]))
    return kernel(
        "Loop",
        {"trips": (INT64, []), "go": np.array(True), "whole": integers(700),
         "divisor": (INT64, [1])},
        {"trips": np.array(2), "divisor": integers(3)}, {"divisor": integers(0)}, body=body,
    )  # fmt: skip


KERNELS: Mapping[str, KernelCase] = {
    "a place far beyond what is reflected": _grid(1e18),
    "a place far beyond the corners": _grid(-1e30, align_corners=1),
    "a nearest place far away": _grid(1e18, mode="nearest"),
    "a place that is not a number": _grid(float("inf")),
    "an image of one pixel reflected at its corners": kernel(
        "GridSample", {"image": _OPEN, "grid": _PLACES},
        {"image": floats(1, 1, 4, 4), "grid": floats(1, 2, 2, 2)},
        {"image": floats(1, 1, 1, 1)},
        padding_mode="reflection", align_corners=1,
    ),
    "a box of an image that is not": _box(of=integers(7)),
    "a box larger than all memory": _box(boxes=np.array([[0, 0, 2**33, 2**33]], np.float32)),
    "an index beyond what is unpooled": kernel(
        "MaxUnpool", {"pooled": (FLOAT, [1, 1, 2, 2]), "places": (INT64, [1, 1, 2, 2])},
        {"pooled": floats(1, 1, 2, 2), "places": integers(0, 3, 12, 15).reshape(1, 1, 2, 2)},
        {"places": np.full((1, 1, 2, 2), 16)}, kernel_shape=[2, 2], strides=[2, 2],
    ),
    "an index beyond the shape that is wanted": kernel(
        "MaxUnpool",
        {"pooled": (FLOAT, [1, 1, 2, 2]), "places": (INT64, [1, 1, 2, 2]), "wanted": (INT64, [4])},
        {"pooled": floats(1, 1, 2, 2), "places": integers(0, 3, 12, 24).reshape(1, 1, 2, 2),
         "wanted": integers(1, 1, 5, 5)},
        {"places": np.full((1, 1, 2, 2), 25)}, kernel_shape=[2, 2], strides=[2, 2],
    ),
    "more reflected than there is": _pad("reflect", (4, 0)),
    "more wrapped than there is": _pad("wrap", (5, 0)),
    "an edge that is cut off": _pad("edge", (-4, 2)),
    "a row that is cut off and padded": _pad("constant", (2, -4)),
    "too short a row to be reflected": kernel(
        "Pad", {"row": (FLOAT, ["T"]), "widths": integers(3, 3)},
        {"row": floats(4)}, {"row": floats(3)}, mode="reflect",
    ),
    "fewer columns than blocks": _columns(columns=6),
    "an image larger than its columns": _columns(image=40),
    "a block of nothing": _columns(block=0),
    "fewer matrices than images": kernel(
        "AffineGrid", {"matrices": (FLOAT, ["B", 2, 3]), "size": (INT64, [4])},
        {"matrices": floats(1, 2, 3), "size": integers(1, 1, 3, 3)},
        {"size": integers(4, 1, 3, 3)},
    ),
    "a transform along the imaginary parts": kernel(
        "DFT", {"signal": (FLOAT, [1, 4, 1]), "length": np.array(4), "axis": (INT64, [])},
        {"signal": floats(1, 4, 1), "axis": np.array(1)}, {"axis": np.array(2)},
    ),
    "fewer biases than filters": kernel(
        "Conv", {"image": _IMAGE, "w": floats(400, 1, 3, 3), "b": (FLOAT, ["B"])},
        {"image": floats(1, 1, 4, 4), "b": floats(400)}, {"b": floats(2)},
    ),
    "fewer biases than transposed filters": kernel(
        "ConvTranspose", {"image": (FLOAT, [1, 2, 4, 4]), "w": floats(2, 200, 3, 3),
                          "b": (FLOAT, ["B"])},
        {"image": floats(1, 2, 4, 4), "b": floats(400)}, {"b": floats(2)}, group=2,
    ),
    "frames without a length": kernel(
        "STFT", {"signal": (FLOAT, [1, 16, 1]), "step": np.array(4), "": np.array(0),
                 "length": (INT64, [])},
        {"signal": floats(1, 16, 1), "length": np.array(8)}, {"length": np.array(0)},
    ),
    "fewer features than weights": kernel(
        "LSTM",
        {"steps": (FLOAT, [3, 1, "D"]), "w": floats(1, 8, 2), "r": floats(1, 8, 2)},
        {"steps": floats(3, 1, 2)}, {"steps": floats(3, 1, 1)}, hidden_size=2,
    ),
    "fewer gates than there are": kernel(
        "LSTM",
        {"steps": (FLOAT, [3, 1, 2]), "w": (FLOAT, [1, "G", 2]), "r": floats(1, 8, 2)},
        {"steps": floats(3, 1, 2), "w": floats(1, 8, 2)}, {"w": floats(1, 2, 2)}, hidden_size=2,
    ),
    "fewer recurrent gates than there are": kernel(
        "GRU",
        {"steps": (FLOAT, [3, 1, 2]), "w": floats(2, 6, 2), "r": (FLOAT, [2, "G", 2])},
        {"steps": floats(3, 1, 2), "r": floats(2, 6, 2)}, {"r": floats(2, 2, 2)},
        hidden_size=2, direction="bidirectional",
    ),
    "an empty sequence": kernel(
        "LSTM",
        {"steps": (FLOAT, [3, 2, 2]), "w": floats(1, 8, 2), "r": floats(1, 8, 2), "": np.array(0),
         "lens": (INT32, [2])},
        {"steps": floats(3, 2, 2), "lens": np.array([3, 1], np.int32)},
        {"lens": np.array([3, 0], np.int32)}, hidden_size=2,
    ),
    "an empty sequence of a GRU": kernel(
        "GRU",
        {"steps": (FLOAT, [3, 2, 2]), "w": floats(1, 6, 2), "r": floats(1, 6, 2), "": np.array(0),
         "lens": (INT32, [2])},
        {"steps": floats(3, 2, 2), "lens": np.array([3, 1], np.int32)},
        {"lens": np.array([0, 1], np.int32)}, hidden_size=2,
    ),
    "a sequence longer than its steps": kernel(
        "RNN",
        {"steps": (FLOAT, [3, 2, 2]), "w": floats(1, 2, 2), "r": floats(1, 2, 2), "": np.array(0),
         "lens": (INT32, [2])},
        {"steps": floats(3, 2, 2), "lens": np.array([3, 1], np.int32)},
        {"lens": np.array([4, 1], np.int32)}, hidden_size=2,
    ),
    "a condition longer than its axis": kernel(
        "Compress", {"row": (FLOAT, [4]), "kept": (BOOL, ["K"])},
        {"row": floats(4), "kept": np.ones(4, bool)}, {"kept": np.ones(4000, bool)}, "done",
        axis=0,
    ),
    "a pooled box of an image that is not": kernel(
        "MaxRoiPool", {"image": _IMAGE, "boxes": (FLOAT, ["R", 5])},
        {"image": floats(1, 1, 4, 4), "boxes": np.array([[0, 0, 0, 2, 2]], np.float32)},
        {"boxes": np.array([[5, 0, 0, 2, 2]], np.float32)}, pooled_shape=[2, 2],
    ),
    "no divisor in a loop": _division_in_a_loop(),
}  # fmt: skip
