"""Hostile and broken models at the command line: one line, exit code 2, nothing written.

Each model of the table is cut and inspected in a process with 2 GiB of memory to spend.  ``cut``
must refuse every one; ``inspect``, which differentiates nothing, may list the cuts of some.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests.conftest import ROOT
from tests.support.zoo import FLOAT, ZOO

pytestmark = pytest.mark.skipif(os.name == "nt", reason="limits are set on forked processes")

Make = Callable[[Path], bytes]
HOSTILE: dict[str, tuple[Make, str]] = {}
"""Name -> what writes the model's files and returns the model, and a piece of the error."""


def dump(model: ModelProto) -> bytes:
    content: bytes = model.SerializeToString()
    return content


def chain() -> ModelProto:
    return ZOO["chain"].build()


def hostile(reason: str) -> Callable[[Callable[[ModelProto], None]], None]:
    """Enter a way to spoil the chain model into the table."""

    def enter(spoil: Callable[[ModelProto], None]) -> None:
        def make(folder: Path) -> bytes:
            model = chain()
            spoil(model)
            content: bytes = model.SerializeToString()
            return content

        HOSTILE[spoil.__name__] = (make, reason)

    return enter


def raw(reason: str) -> Callable[[Make], None]:
    """Enter a model given as bytes, with files of its own."""

    def enter(make: Make) -> None:
        HOSTILE[make.__name__] = (make, reason)

    return enter


def put_behind(model: ModelProto, node: NodeProto, place: int = 4) -> None:
    """Put a node in the chain: it reads ``act1``, and what it gives goes on as ``odd``."""
    model.graph.node.insert(place, node)
    for later in model.graph.node[place + 1 :]:
        for index, name in enumerate(later.input):
            if name == "act1":
                later.input[index] = "odd"


# --- bytes ----------------------------------------------------------------------------------


@raw("not in ONNX format")
def truncated(folder: Path) -> bytes:
    return dump(chain())[:-100]


@raw("holds no graph")
def empty_file(folder: Path) -> bytes:
    return b""


@raw("not in ONNX format")
def text(folder: Path) -> bytes:
    return b"this is no model\n" * 100


@hostile("holds no graph")
def without_nodes(model: ModelProto) -> None:
    del model.graph.node[:]


@raw("not UTF-8")
def bytes_that_are_no_text(folder: Path) -> bytes:
    return dump(chain()).replace(b"act1", b"a\xff\xfe1")


@raw("not UTF-8")
def a_description_that_is_no_text(folder: Path) -> bytes:
    model = chain()
    model.doc_string = "DESCRIPTION"
    return dump(model).replace(b"DESCRIPTION", b"\xff\xfeSCRIPTION")


# --- names ----------------------------------------------------------------------------------


@hostile("reads 'act2'")
def cyclic(model: ModelProto) -> None:
    model.graph.node[0].input[0] = "act2"


@hostile("two values bear the name")
def duplicate_names(model: ModelProto) -> None:
    model.graph.node[1].output[0] = "linear0"


@hostile("two values bear the name 'w0'")
def duplicate_weights(model: ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


@hostile("reads 'w0'")
def missing_initializer(model: ModelProto) -> None:
    del model.graph.initializer[0]


@hostile("nothing makes its output")
def missing_output(model: ModelProto) -> None:
    model.graph.output[0].name = "nowhere"


@hostile("a name of 1000000 characters")
def endless_name(model: ModelProto) -> None:
    model.graph.node[0].name = "x" * 10**6


@hostile("control characters")
def line_break_in_a_name(model: ModelProto) -> None:
    model.graph.node[2].name = "a\nsplitonnx: all is well"


@hostile("control characters")
def escape_in_a_name(model: ModelProto) -> None:
    model.graph.node[2].op_type = "\x1b[2J"


@hostile("is marked single but has an empty string")
def empty_input_name(model: ModelProto) -> None:
    model.graph.node[1].input[0] = ""


@hostile("no name")
def input_without_a_name(model: ModelProto) -> None:
    model.graph.input.add().type.tensor_type.elem_type = FLOAT


@hostile("an attribute twice")
def attribute_twice(model: ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("transB", 1))


# --- types, shapes, attributes --------------------------------------------------------------


@hostile("linear0")
def wrong_type(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.INT32


@hostile("no known data type")
def unknown_type(model: ModelProto) -> None:
    model.graph.initializer[0].data_type = 999


@hostile("'x' has no known data type")
def unknown_input_type(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = -5


@hostile("sequence_type")
def sequence_input(model: ModelProto) -> None:
    inner = helper.make_tensor_type_proto(FLOAT, ["N", 6])
    model.graph.input[0].type.CopyFrom(helper.make_sequence_type_proto(inner))


@hostile("map_type")
def map_input(model: ModelProto) -> None:
    inner = helper.make_tensor_type_proto(FLOAT, ["N", 6])
    model.graph.input[0].type.CopyFrom(helper.make_map_type_proto(TensorProto.INT64, inner))


@hostile("optional_type")
def optional_input(model: ModelProto) -> None:
    inner = helper.make_tensor_type_proto(FLOAT, ["N", 6])
    model.graph.input[0].type.CopyFrom(helper.make_optional_type_proto(inner))


@hostile("")
def string_input(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING


@hostile("dimensions")
def huge_rank(model: ModelProto) -> None:
    for _ in range(1000):
        model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=1)


@hostile("'x' has a dimension beyond all memory")
def image_without_end(model: ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**60


@hostile("shape")
def negative_shape(model: ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -1


@hostile("Mismatched attribute type")
def attribute_of_another_type(model: ModelProto) -> None:
    model.graph.node[0].attribute[0].CopyFrom(helper.make_attribute("transB", "yes"))


@hostile("takes no attribute 'speed'")
def unknown_attribute(model: ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("speed", 11))


@hostile("")
def split_that_does_not_add_up(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([5, 9]), "sizes"))
    put_behind(model, helper.make_node("Split", ["act1", "sizes"], ["odd", "rest"], axis=1))


@hostile("ratio")
def dropout_that_drops_nan(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(math.nan, np.float32), "rate"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "on"))
    put_behind(model, helper.make_node("Dropout", ["act1", "rate", "on"], ["odd"]))


@hostile("unknown data type")
def cast_to_nothing(model: ModelProto) -> None:
    put_behind(model, helper.make_node("Cast", ["act1"], ["odd"], to=-3))


@hostile("unknown data type")
def window_of_nothing(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(8), "size"))
    window = helper.make_node("HannWindow", ["size"], ["window"], output_datatype=127)
    put_behind(model, helper.make_node("Mul", ["act1", "window"], ["odd"]))
    model.graph.node.insert(0, window)


@hostile("names an axis that no tensor has")
def axis_at_the_end_of_int64(model: ModelProto) -> None:
    put_behind(
        model, helper.make_node("LayerNormalization", ["act1", "b1"], ["odd"], axis=2**63 - 1)
    )


@hostile("has strides below 1")
def window_that_does_not_move(model: ModelProto) -> None:
    put_behind(model, helper.make_node("MaxPool", ["act1"], ["odd"], kernel_shape=[1], strides=[0]))


@hostile("has no axis 9")
def axis_beyond_the_rank(model: ModelProto) -> None:
    put_behind(model, helper.make_node("LayerNormalization", ["act1", "b1"], ["odd"], axis=9))


@hostile("dimensions")
def convolution_of_a_matrix(model: ModelProto) -> None:
    weight = numpy_helper.from_array(np.ones((4, 7, 3, 3), np.float32), "kernel")
    model.graph.initializer.append(weight)
    put_behind(model, helper.make_node("Conv", ["act1", "kernel"], ["odd"]))


@hostile("")
def window_of_billions(model: ModelProto) -> None:
    put_behind(model, helper.make_node("MaxPool", ["act1"], ["odd"], kernel_shape=[2**31, 2**62]))


@hostile("(Split): onnx's checker broke down over it")
def split_into_fewer_than_it_gives(model: ModelProto) -> None:
    put_behind(model, helper.make_node("Split", ["act1"], ["odd", "b", "c"], axis=1, num_outputs=1))


@hostile("broke down over it (SIG")
def transposition_of_too_few_axes(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2]), "places"))
    put_behind(model, helper.make_node("Unsqueeze", ["act1", "places"], ["deep"]))
    put_behind(model, helper.make_node("Transpose", ["deep"], ["turned"], perm=[0, 1, 3]), 5)
    put_behind(model, helper.make_node("Flatten", ["turned"], ["odd"]), 6)


@hostile("refers to one that no function has")
def attribute_of_a_function_outside_one(model: ModelProto) -> None:
    attribute = model.graph.node[0].attribute[0]
    attribute.ref_attr_name = "transposed"
    attribute.ClearField("i")


@hostile("(LinearAttention) means is not a usable")
def operator_whose_meaning_lacks_its_inputs(model: ModelProto) -> None:
    model.opset_import[0].version = 27
    node = helper.make_node("LinearAttention", ["act1"] * 6, ["odd", "state"])
    for name, value in (("kv_num_heads", 4), ("q_num_heads", 4), ("update_rule", "constant")):
        node.attribute.append(helper.make_attribute(name, value))
    put_behind(model, node)


# --- sizes ----------------------------------------------------------------------------------


@hostile("declares 4398046511104 bytes")
def twenty_bytes_that_claim_terabytes(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.raw_data = bytes(20)
    tensor.dims[:] = [2**20, 2**20]


@hostile("declares 4398046511104 bytes")
def no_bytes_that_claim_terabytes(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.dims[:] = [2**20, 2**20]


@hostile("declares")
def size_that_overflows(model: ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [2**62, 2**62, 0x10]


@hostile("strings")
def strings_that_are_not_there(model: ModelProto) -> None:
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_type = TensorProto.STRING


@hostile("sparse")
def sparse_weight(model: ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    places = numpy_helper.from_array(np.zeros(1, np.int64), "places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [2**40]))


def enter_terabytes(kind: str, *values: int, **attributes: Any) -> None:
    """Enter a constant of terabytes that an operator makes of a few bytes."""

    def make(folder: Path) -> bytes:
        model, names = chain(), []
        for index, value in enumerate(values):
            array = np.array(value if kind == "Range" else [value, 2**20])
            model.graph.initializer.append(numpy_helper.from_array(array, f"size{index}"))
            names.append(f"size{index}")
        if kind in ("Expand", "Tile", "Pad"):
            seed = numpy_helper.from_array(np.ones((1, 1), np.float32), "seed")
            model.graph.initializer.append(seed)
            if kind == "Pad":
                model.graph.initializer[-2].CopyFrom(
                    numpy_helper.from_array(np.array([0, 0, *values, 2**20]), "size0")
                )
            names.insert(0, "seed")
        nodes = [helper.make_node(kind, names, ["large"], **attributes)]
        nodes.append(helper.make_node("Cast", ["large"], ["floats"], to=FLOAT))
        nodes.append(helper.make_node("Add", ["act1", "floats"], ["odd"]))
        for offset, node in enumerate(nodes):
            put_behind(model, node, 4 + offset)
        nodes[-1].input[0] = "act1"
        model.graph.node[6].input[0] = "act1"
        return dump(model)

    HOSTILE[f"{kind}_of_terabytes"] = (make, "")


enter_terabytes("ConstantOfShape", 2**22)
enter_terabytes("Expand", 2**22)
enter_terabytes("Tile", 2**22)
enter_terabytes("Range", 0, 2**42, 1)
enter_terabytes("Pad", 2**22)


# --- operators and functions ----------------------------------------------------------------


@hostile("com.evil")
def custom_operator(model: ModelProto) -> None:
    model.graph.node[1].domain = "com.evil"


@hostile("com.microsoft")
def operator_of_the_runtime(model: ModelProto) -> None:
    model.graph.node[1].domain = "com.microsoft"


@hostile("com.evil")
def custom_operator_in_a_branch(model: ModelProto) -> None:
    node = helper.make_node("Spy", ["act1"], ["seen"], domain="com.evil")
    put_behind(model, make_if([node], "seen"))


@hostile("com.evil")
def custom_operator_in_a_branch_of_a_function(model: ModelProto) -> None:
    spy = helper.make_node("Spy", ["a"], ["seen"], domain="com.evil")
    constant = helper.make_node("Constant", [], ["yes"], value_int=1)
    cast = helper.make_node("Cast", ["yes"], ["condition"], to=TensorProto.BOOL)
    add_function(model, "Wrap", [constant, cast, make_if([spy], "seen", result="b")])
    put_behind(model, helper.make_node("Wrap", ["act1"], ["odd"], domain="mine"))


@hostile("no such operator")
def unknown_operator(model: ModelProto) -> None:
    model.graph.node[1].op_type = "Explode"


@hostile("opset 99")
def opset_99(model: ModelProto) -> None:
    model.opset_import[0].version = 99


@hostile("opset 0")
def opset_0(model: ModelProto) -> None:
    model.opset_import[0].version = 0


@hostile("opset -9223372036854775808")
def opset_below_zero(model: ModelProto) -> None:
    model.opset_import[0].version = -(2**63)


@hostile("two opsets")
def two_opsets(model: ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("", 7))


@hostile("no opset")
def no_opset(model: ModelProto) -> None:
    del model.opset_import[:]


@hostile("calls itself")
def function_that_calls_itself(model: ModelProto) -> None:
    add_function(model, "Again", [helper.make_node("Again", ["a"], ["b"], domain="mine")])
    put_behind(model, helper.make_node("Again", ["act1"], ["odd"], domain="mine"))


@hostile("calls itself")
def functions_that_call_each_other(model: ModelProto) -> None:
    add_function(model, "Ping", [helper.make_node("Pong", ["a"], ["b"], domain="mine")])
    add_function(model, "Pong", [helper.make_node("Ping", ["a"], ["b"], domain="mine")])
    put_behind(model, helper.make_node("Ping", ["act1"], ["odd"], domain="mine"))


@hostile("nodes; at most")
def billion_laughs(model: ModelProto) -> None:
    for level in range(30):
        called, domain = (f"Laugh{level - 1}", "mine") if level else ("Relu", "")
        add_function(
            model,
            f"Laugh{level}",
            [
                helper.make_node(called, ["a"], ["m"], domain=domain),
                helper.make_node(called, ["m"], ["b"], domain=domain),
            ],
        )
    put_behind(model, helper.make_node("Laugh29", ["act1"], ["odd"], domain="mine"))


@hostile("deep")
def functions_nested_without_end(model: ModelProto) -> None:
    for level in range(5000):
        called, domain = (f"F{level + 1}", "mine") if level < 4999 else ("Relu", "")
        add_function(model, f"F{level}", [helper.make_node(called, ["a"], ["b"], domain=domain)])
    put_behind(model, helper.make_node("F0", ["act1"], ["odd"], domain="mine"))


@hostile("function 'Twice' twice")
def function_twice(model: ModelProto) -> None:
    for _ in range(2):
        add_function(model, "Twice", [helper.make_node("Relu", ["a"], ["b"])])


@hostile("its output 'less' is read, but nothing makes it")
def branch_that_gives_nothing(model: ModelProto) -> None:
    ends = [helper.make_tensor_value_info("bias", FLOAT, None)]
    made = [helper.make_node("Identity", ["b1"], ["bias"])]
    branches = {
        "then_branch": helper.make_graph(made, "then", [], []),
        "else_branch": helper.make_graph(made, "else", [], ends),
    }
    put_behind(model, helper.make_node("If", ["condition"], ["less"], **branches))
    put_behind(model, helper.make_node("Add", ["act1", "less"], ["odd"]), 5)


@hostile("")
def loop_of_ages(model: ModelProto) -> None:
    put_behind(model, make_loop(2**60))


@raw("nodes; at most")
def a_million_nodes(folder: Path) -> bytes:
    part = ModelProto()  # Protocol Buffers join the parts of a message that stand side by side
    part.graph.node.append(helper.make_node("Relu", ["act1"], ["odd"]))
    content: bytes = chain().SerializeToString() + dump(part) * 10**6
    return content


def add_function(model: ModelProto, name: str, nodes: list[NodeProto]) -> None:
    imports = [*model.opset_import]
    if len(imports) == 1:
        model.opset_import.append(helper.make_opsetid("mine", 1))
        imports = [*model.opset_import]
    model.functions.append(helper.make_function("mine", name, ["a"], ["b"], nodes, imports))


def make_if(nodes: list[NodeProto], name: str, *, result: str = "odd") -> NodeProto:
    body = helper.make_graph(nodes, "body", [], [helper.make_tensor_value_info(name, FLOAT, None)])
    other = helper.make_node("Identity", ["act1"], ["other"])
    ends = [helper.make_tensor_value_info("other", FLOAT, None)]
    branches = {"then_branch": body, "else_branch": helper.make_graph([other], "other", [], ends)}
    return helper.make_node("If", ["condition"], [result], **branches)


def make_loop(trips: int) -> NodeProto:
    value = helper.make_tensor_value_info("carried", FLOAT, None)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["on"]),
            helper.make_node("Relu", ["carried"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            value,
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", FLOAT, None),
        ],
    )
    return helper.make_node("Loop", [f"trips{trips}", "", "act1"], ["odd"], body=body)


# --- external data --------------------------------------------------------------------------


def external(
    reason: str, prepare: Callable[[Path], object] = lambda folder: None, **entries: str
) -> Make:
    """Enter a model whose first weight lies outside; ``prepare`` writes files beside it."""

    def make(folder: Path) -> bytes:
        (folder / "weights.bin").write_bytes(bytes(4096))
        prepare(folder)
        model = chain()
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        return dump(model)

    return make


def make_secret(folder: Path) -> None:
    (folder.parent / "secret.bin").write_bytes(bytes(4096))


def link_out(folder: Path) -> None:
    make_secret(folder)
    os.symlink(folder.parent / "secret.bin", folder / "link.bin")


_EXTERNAL: Mapping[str, tuple[str, Callable[[Path], object], dict[str, str]]] = {
    "two_dots": ("outside", make_secret, {"location": "../secret.bin"}),
    "dots_inside": ("outside", make_secret, {"location": "a/../../secret.bin"}),
    "absolute_path": ("outside", make_secret, {"location": "/etc/passwd"}),
    "link_out_of_the_folder": ("outside", link_out, {"location": "link.bin"}),
    "link_in_a_circle": (
        "missing or cannot be read",
        lambda folder: os.symlink("circle", folder / "circle"),
        {"location": "circle"},
    ),
    "process_memory": ("outside", make_secret, {"location": "*/_ORT_MEM_ADDR_/*"}),
    "device_zero": ("outside", make_secret, {"location": "/dev/zero"}),
    "link_to_a_device": (
        "outside",
        lambda folder: os.symlink("/dev/zero", folder / "zero"),
        {"location": "zero"},
    ),
    "pipe": (
        "no file with content",
        lambda folder: os.mkfifo(folder / "pipe"),
        {"location": "pipe"},
    ),
    "folder": ("no file with content", lambda folder: (folder / "d").mkdir(), {"location": "d"}),
    "the_folder_itself": ("no file with content", make_secret, {"location": "."}),
    "nothing": ("outside", make_secret, {}),
    "null_byte": ("control characters", make_secret, {"location": "weights\0.bin"}),
    "endless_location": ("a name of", make_secret, {"location": "w/" * 10**5}),
    "offset_beyond_the_end": (
        "declares 192 bytes",
        make_secret,
        {"location": "weights.bin", "offset": "4000"},
    ),
    "offset_that_overflows": (
        "declares 192 bytes",
        make_secret,
        {"location": "weights.bin", "offset": str(2**64 - 8)},
    ),
    "offset_below_zero": (
        "declares 192 bytes",
        make_secret,
        {"location": "weights.bin", "offset": "-8"},
    ),
    "offset_that_is_no_number": (
        "no valid place",
        make_secret,
        {"location": "weights.bin", "offset": "0x10"},
    ),
    "length_that_overflows": (
        "declares 192 bytes",
        make_secret,
        {"location": "weights.bin", "length": str(2**64)},
    ),
    "model_as_its_own_data": (
        "declares 192 bytes",
        make_secret,
        {"location": "model.onnx", "offset": "1000000"},
    ),
}
for _name, (_reason, _prepare, _entries) in _EXTERNAL.items():
    HOSTILE[f"external_{_name}"] = (external(_reason, _prepare, **_entries), _reason)


def complete(content: bytes) -> bytes:
    """Add the small constants that some of the nodes above read."""
    model = ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        return content
    read = {name for node in model.graph.node for name in node.input if isinstance(name, str)}
    if "condition" in read:
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "condition"))
    for name in read:
        if name.startswith("trips"):
            trips = numpy_helper.from_array(np.array(int(name.removeprefix("trips"))), name)
            model.graph.initializer.append(trips)
    return dump(model) if {"condition"} & read or "trips" in str(read) else content


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], dict[str, Any]]:
    """Run both commands on every model of the table."""
    scratch = tmp_path_factory.mktemp("hostile")
    for name, (make, _) in HOSTILE.items():
        folder = scratch / name
        folder.mkdir()
        (folder / "model.onnx").write_bytes(complete(make(folder)))
    command = [sys.executable, "-m", "tests.fuzzing.screenings", str(scratch)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {(outcome["name"], outcome["command"]): outcome for outcome in found}


@pytest.mark.parametrize("command", ["cut", "inspect"])
@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_in_one_line(
    name: str, command: str, outcomes: Mapping[tuple[str, str], dict[str, Any]]
) -> None:
    outcome = outcomes[name, command]
    assert outcome["code"] == 2 or (command == "inspect" and outcome["code"] == 0), outcome
    assert not outcome["written"]
    assert outcome["megabytes"] < 1500, outcome
    if outcome["code"] == 0:
        assert not outcome["errors"]
        return
    (line,) = outcome["errors"].splitlines()
    assert line.startswith("splitonnx: ")
    assert line.isprintable()
    assert len(line) < 5000
    assert not outcome["printed"]
    if command == "cut":
        assert HOSTILE[name][1] in line
