"""Bytes that are not a model, and names that are none, twice there, or not there at all."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto, helper

from tests.support.hostile.entries import (
    chain,
    dump,
    hostile,
    raw,
)
from tests.support.zoo import FLOAT


@raw("not in ONNX format")
def truncated(folder: Path) -> bytes:
    return dump(chain())[:-100]


@raw("holds no graph")
def empty_file(folder: Path) -> bytes:
    return b""


@raw("not in ONNX format")
def text(folder: Path) -> bytes:
    return b"this is not a model\n" * 100


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
