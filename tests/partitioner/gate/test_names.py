"""Names and declared types: each given once, used after it was given, and readable."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from onnx import ModelProto, TensorProto, helper

from splitonnx.errors import ModelError, NotAModel, UnsupportedModel
from splitonnx.graph_limits import MODEL
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.gate.names import (
    check_function,
    check_names,
    check_texts,
    check_types,
)
from tests.partitioner.gate.broken_models import Breakage, hold_refusal, make_model


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


BROKEN: list[Breakage] = [
    (close_circle, NotAModel, "reads 'act2'"),
    (double_value, NotAModel, "two values bear the name"),
    (double_weight, NotAModel, "two values bear the name 'w0'"),
    (drop_weight, NotAModel, "reads 'w0'"),
    (drop_output, NotAModel, "nothing makes its output 'nowhere'"),
]


@pytest.mark.parametrize(
    ("break_it", "kind", "reason"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_model_is_refused_in_one_line(
    break_it: Callable[[ModelProto], None], kind: type[ModelError], reason: str
) -> None:
    hold_refusal(break_it, kind, reason)


def rename(model: ModelProto, name: str) -> ModelProto:
    """Rename what the first node makes and the second one reads."""
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = name
    return model


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("two\nlines", "control characters"),
        ("\x1b[31mred", "control characters"),
        ("x" * (MODEL.name_characters + 1), f"a name of {MODEL.name_characters + 1} characters"),
    ],
)
def test_a_name_that_no_line_can_hold_is_refused(name: str, reason: str) -> None:
    with pytest.raises(NotAModel, match=reason) as caught:
        check_texts(rename(make_model(), name), "the model")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["x" * MODEL.name_characters, "größe/Ünit:0", "a b", "日本"])
def test_a_name_of_letters_of_any_language_is_taken(name: str) -> None:
    check_texts(rename(make_model(), name), "the model")


def test_text_that_is_not_utf8_is_refused() -> None:
    content = rename(make_model(), "NAME").SerializeToString()
    with pytest.raises(NotAModel, match="UTF-8"):
        open_model(content.replace(b"NAME", b"\xff\xfe\xfd\xfc"))


def test_descriptions_may_have_several_lines() -> None:
    model = make_model()
    model.doc_string = model.graph.doc_string = "first\nsecond"
    check_texts(model, "the model")


def test_an_own_entry_in_the_metadata_that_is_there_twice_is_refused() -> None:
    model = make_model()
    for key in ("note", "note", "splitonnx.options"):
        model.metadata_props.add(key=key, value="{}")
    check_texts(model, "the model")
    model.metadata_props.add(key="splitonnx.options", value="{}")
    with pytest.raises(NotAModel, match=r"have the entry 'splitonnx\.options' twice"):
        check_texts(model, "the model")


def declare(model: ModelProto, *dims: int | str) -> ModelProto:
    info = helper.make_tensor_value_info(model.graph.node[0].output[0], TensorProto.FLOAT, dims)
    model.graph.value_info.append(info)
    return model


def test_types_that_no_tensor_has_are_refused() -> None:
    check_types(declare(make_model(), *[1] * MODEL.rank), "the model")
    with pytest.raises(NotAModel, match="33 dimensions"):
        check_types(declare(make_model(), *[1] * (MODEL.rank + 1)), "the model")
    with pytest.raises(NotAModel, match="beyond all memory"):
        check_types(declare(make_model(), 2**40), "the model")
    model = declare(make_model(), 3)
    model.graph.value_info[-1].type.tensor_type.elem_type = 999
    with pytest.raises(NotAModel, match="no known data type"):
        check_types(model, "the model")


def test_inputs_and_outputs_must_be_tensors() -> None:
    model = make_model()
    tensor = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    model.graph.output[0].type.CopyFrom(helper.make_sequence_type_proto(tensor))
    with pytest.raises(UnsupportedModel, match="sequence_type; inputs and outputs must be tensors"):
        check_types(model, "the model")


def test_a_body_sees_the_names_around_it_and_hides_its_own() -> None:
    model = make_model()
    seen, inner = model.graph.node[0].output[0], "inner"
    output = helper.make_tensor_value_info(inner, TensorProto.FLOAT, None)
    bodies = {
        kind: helper.make_graph([helper.make_node("Neg", [seen], [inner])], kind, [], [output])
        for kind in ("then_branch", "else_branch")
    }
    model.graph.node.append(helper.make_node("If", ["x"], ["chosen"], **bodies))
    check_names(model, "the model")
    model.graph.node.append(helper.make_node("Relu", [inner], ["leaked"]))
    with pytest.raises(NotAModel, match="reads 'inner'"):
        check_names(model, "the model")
    body = model.graph.node[-2].attribute[0].g
    body.node[0].output[0] = body.output[0].name = seen
    del model.graph.node[-1]
    with pytest.raises(NotAModel, match="two values bear the name"):
        check_names(model, "the model")


def test_an_attribute_is_given_once() -> None:
    model = make_model()
    model.graph.node[0].attribute.append(model.graph.node[0].attribute[0])
    with pytest.raises(NotAModel, match="has an attribute twice"):
        check_names(model, "the model")


def test_a_function_makes_what_it_gives() -> None:
    own = [helper.make_opsetid("", 18)]
    body = helper.make_node("Neg", ["a"], ["b"])
    check_function(helper.make_function("mine", "F", ["a"], ["b"], [body], own), "the model")
    with pytest.raises(NotAModel, match="nothing makes 'c' of its function 'F'"):
        check_function(helper.make_function("mine", "F", ["a"], ["c"], [body], own), "the model")
    with pytest.raises(NotAModel, match="reads 'a'"):
        check_function(helper.make_function("mine", "F", ["z"], ["b"], [body], own), "the model")
