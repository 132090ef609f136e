"""The gate: hostile and broken models are refused in one line, before anything reads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from splitonnx.errors import ForbiddenExternalData, ModelError, NotAModel, UnsupportedModel
from splitonnx.partitioner.gate.gates import open_model
from tests.support.zoo import FLOAT, ZOO, Net


def make_model() -> ModelProto:
    return ZOO["chain"].build()


def swap_nodes(model: ModelProto) -> None:
    first, second = model.graph.node[0], model.graph.node[1]
    kept = ModelProto.FromString(model.SerializeToString()).graph.node[0]
    first.CopyFrom(second)
    second.CopyFrom(kept)


def close_circle(model: ModelProto) -> None:
    model.graph.node[0].input[0] = "act2"


def double_value(model: ModelProto) -> None:
    model.graph.node[1].output[0] = model.graph.node[0].output[0]


def double_weight(model: ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


def drop_weight(model: ModelProto) -> None:
    del model.graph.initializer[0]


def drop_output(model: ModelProto) -> None:
    model.graph.output[0].name = "nowhere"


def drop_opset(model: ModelProto) -> None:
    del model.opset_import[:]


def raise_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 99


def claim_terabytes(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.dims[:] = [2**20, 2**20]


def claim_typed_terabytes(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.dims[:] = [2**20, 2**20]


def half_a_weight(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.float_data.extend([1.0, 2.0])


def negative_shape(model: ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -1


def unknown_type(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = 999


def wrong_type(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.INT32


def custom_operator(model: ModelProto) -> None:
    model.graph.node[1].domain = "com.evil"


def unknown_operator(model: ModelProto) -> None:
    model.graph.node[1].op_type = "Explode"


def training_operator(model: ModelProto) -> None:
    model.graph.node[1].domain = "com.microsoft"


def unknown_attribute(model: ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("speed", 11))


def recursion(model: ModelProto) -> None:
    body = helper.make_node("Again", ["a"], ["b"], domain="mine")
    model.functions.append(
        helper.make_function("mine", "Again", ["a"], ["b"], [body], list(model.opset_import))
    )
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Again", "mine"


def sparse_weight(model: ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def empty_graph(model: ModelProto) -> None:
    del model.graph.node[:]


BROKEN: list[tuple[Callable[[ModelProto], None], type[ModelError], str]] = [
    (swap_nodes, NotAModel, "reads 'linear0'"),
    (close_circle, NotAModel, "reads 'act2'"),
    (double_value, NotAModel, "two values bear the name"),
    (double_weight, NotAModel, "two values bear the name 'w0'"),
    (drop_weight, NotAModel, "reads 'w0'"),
    (drop_output, NotAModel, "nothing makes its output 'nowhere'"),
    (drop_opset, NotAModel, "opset"),
    (raise_opset, UnsupportedModel, "opset 99"),
    (claim_terabytes, NotAModel, "declares 4398046511104 bytes"),
    (claim_typed_terabytes, NotAModel, "declares 4398046511104 bytes"),
    (half_a_weight, NotAModel, "'w0'"),
    (negative_shape, NotAModel, "shape"),
    (unknown_type, NotAModel, "no known data type"),
    (wrong_type, NotAModel, "linear0"),
    (custom_operator, UnsupportedModel, "com.evil"),
    (unknown_operator, UnsupportedModel, "Explode"),
    (training_operator, UnsupportedModel, "com.microsoft"),
    (unknown_attribute, NotAModel, "speed"),
    (recursion, UnsupportedModel, "calls itself"),
    (sparse_weight, UnsupportedModel, "sparse"),
    (empty_graph, NotAModel, "no graph"),
]


@pytest.mark.parametrize(
    ("break_it", "kind", "reason"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_model_is_refused_in_one_line(
    break_it: Callable[[ModelProto], None], kind: type[ModelError], reason: str
) -> None:
    model = make_model()
    break_it(model)
    with pytest.raises(kind) as caught:
        open_model(model.SerializeToString())
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_cut_short_is_refused() -> None:
    content = make_model().SerializeToString()
    for length in range(1, len(content), 97):
        with pytest.raises(ModelError):
            open_model(content[:length])


def externalise(model: ModelProto, **entries: str) -> ModelProto:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return model


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"location": "absent.bin"}, "is missing"),
        ({"location": "weights.bin", "offset": "4000"}, "declares 192 bytes"),
        ({"location": "weights.bin", "offset": "-8"}, "declares 192 bytes"),
        ({"location": "weights.bin", "length": "8"}, "declares 192 bytes"),
        ({"location": "weights.bin", "offset": "many"}, "no valid place"),
        ({"location": ""}, "outside"),
    ],
)
def test_external_data_that_is_not_there_is_refused(
    entries: dict[str, str], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(4096))
    path = tmp_path / "model.onnx"
    path.write_bytes(externalise(make_model(), **entries).SerializeToString())
    with pytest.raises(ModelError, match=reason):
        open_model(path)


def test_a_link_out_of_the_folder_is_no_way_out(tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(4096))
    folder = tmp_path / "model"
    folder.mkdir()
    os.symlink(tmp_path / "secret.bin", folder / "weights.bin")
    path = folder / "model.onnx"
    path.write_bytes(externalise(make_model(), location="weights.bin").SerializeToString())
    with pytest.raises(ForbiddenExternalData):
        open_model(path)


def test_a_model_in_memory_may_read_no_file() -> None:
    model = externalise(make_model(), location="weights.bin")
    for source in (model, model.SerializeToString()):
        with pytest.raises(ForbiddenExternalData):
            open_model(source)


def test_the_callers_model_is_not_changed() -> None:
    from splitonnx.partitioner.partitions import cut

    model = make_model()
    before = model.SerializeToString()
    cut(model, at="act1")
    assert model.SerializeToString() == before


@pytest.mark.parametrize("name", ZOO)
def test_a_good_model_passes(name: str) -> None:
    model = open_model(ZOO[name].build())
    assert [value.name for value in model.graph.outputs] == [
        value.name for value in ZOO[name].build().graph.output
    ]


def test_functions_of_the_model_itself_are_taken() -> None:
    model = make_model()
    body = helper.make_node("Relu", ["a"], ["b"])
    model.functions.append(
        helper.make_function("mine", "Rectify", ["a"], ["b"], [body], list(model.opset_import))
    )
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Rectify", "mine"
    onnx.checker.check_model(model)
    assert FLOAT == TensorProto.FLOAT
    assert len(list(open_model(model).graph)) == len(model.graph.node)


@pytest.mark.parametrize("operator", ["Concat", "Sum"])
def test_a_node_has_a_bounded_number_of_inputs(operator: str) -> None:
    def build(count: int) -> ModelProto:
        net = Net()
        attributes = {"axis": 1} if operator == "Concat" else {}
        net.op(operator, *["x"] * count, out="y", **attributes)
        return net.finish({"x": (FLOAT, ["N", 1])}, "y", count if attributes else 1)

    open_model(build(4096))
    with pytest.raises(UnsupportedModel, match=rf"'y_node' \({operator}\): it has 4097 inputs; at"):
        open_model(build(4097))
