"""Graphs read and copied: what onnx-ir makes of them, to the byte, whatever stands in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx
import onnx_ir as ir
import pytest

from splitonnx.partitioner.differentiation.derived import derivations
from splitonnx.partitioner.graphs.readings import copy_model, read_model
from splitonnx.partitioner.partitions import cut
from tests.partitioner.graphs.test_transcripts import build_noted
from tests.support.node_cases import list_node_cases
from tests.support.zoo import ZOO

OPERATORS = ["Cast", "Constant", "Dropout", "If", "Loop", "Optional", "Scan", "SequenceAt"]


def write(model: ir.Model) -> bytes:
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def list_differentiated(monkeypatch: pytest.MonkeyPatch) -> Iterator[onnx.ModelProto]:
    """Yield what the gradient builder makes of the models of the zoo."""
    seen: list[onnx.ModelProto] = []

    def spy(proto: onnx.ModelProto) -> ir.Model:
        seen.append(proto)
        return read_model(proto)

    monkeypatch.setattr(derivations, "read_model", spy)
    for entry in ZOO.values():
        cut(entry.build(), at=None, loss=entry.loss)
        yield seen[-1]


def test_a_model_is_read_as_onnx_ir_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [entry.build() for entry in ZOO.values()]
    cases = [case.model for operator in OPERATORS for case in list_node_cases(operator)]
    for proto in (*models, *list_differentiated(monkeypatch), *cases, build_noted()):
        assert write(read_model(proto)) == write(ir.from_proto(proto))


def test_a_model_is_copied_as_onnx_ir_clones_it() -> None:
    models = [entry.build() for entry in ZOO.values()]
    cases = [case.model for operator in OPERATORS for case in list_node_cases(operator)]
    for proto in (*models, *cases, build_noted()):
        model = ir.from_proto(proto)
        assert write(copy_model(model)) == write(model) == write(model.clone())


def test_a_copy_is_changed_by_itself() -> None:
    model = ir.from_proto(ZOO["chain"].build())
    before = write(model)
    copy = copy_model(model)
    for node in copy.graph:
        node.metadata_props["noted"] = "1"
        node.name = f"{node.name}/copy"
        for value in node.outputs:
            value.name, value.shape = f"{value.name}/copy", None
    copy.graph.opset_imports["own"] = 1
    assert write(model) == before
    assert write(copy) != before


@pytest.mark.parametrize("make", [lambda m: read_model(ir.to_proto(m)), copy_model])
def test_plain_graphs_are_made_without_onnx_ir(
    make: Callable[[ir.Model], ir.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ir.from_proto(ZOO["attention"].build())

    def refuse(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(ir, "from_proto", refuse)
    monkeypatch.setattr(ir.Model, "clone", refuse)
    assert write(make(model)) == write(model)


def test_what_does_not_fit_together_is_told_in_onnx_ir_s_words() -> None:
    proto = ZOO["chain"].build()
    proto.graph.node.append(proto.graph.node[0])
    with pytest.raises(RuntimeError) as own:
        read_model(proto)
    with pytest.raises(RuntimeError) as other:
        ir.from_proto(proto)
    assert str(own.value) == str(other.value)


def test_values_that_are_alike_share_a_shape_and_have_types_of_their_own() -> None:
    proto = onnx.shape_inference.infer_shapes(ZOO["residual"].build())
    values = [node.outputs[0] for node in read_model(proto).graph]
    shapes = {str(value.shape): value.shape for value in values}
    assert all(value.shape is shapes[str(value.shape)] for value in values)
    assert len({id(value.type) for value in values}) == len(values) > len(shapes)
