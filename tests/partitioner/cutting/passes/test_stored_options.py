"""Options in a model's metadata apply, are said, and give way to the user's.

``tests/torch/test_exports.py`` has them written by an export.
"""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from splitonnx.bundles import Bundle
from splitonnx.errors import UnsupportedModel
from splitonnx.manifests import Role
from splitonnx.partitioner.cutting.passes.stored_options import (
    KEY,
    NONE_STORED,
    StoredOptions,
    describe_stored,
    read_stored,
    write_stored,
)
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.remarks import Kind
from tests.support.case_trials import run_step
from tests.support.small_models import load_data, load_model

NAME = "41_lost_detach"


def store(**options: list[str]) -> onnx.ModelProto:
    """Write options into the metadata by hand."""
    model = load_model(NAME)
    model.metadata_props.add(key=KEY, value=json.dumps(options))
    return model


def list_trained(bundle: Bundle) -> set[str]:
    state = bundle.client.manifest.state
    return {spec.tensor.name for spec in state if spec.role is Role.PARAMETER}


def test_a_stored_stop_trains_as_the_same_stop_given_by_the_user(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = load_data(NAME)
    stored = cut(store(stop_gradients=["e"]), at=None)
    assert "no gradient passes through 'e', as the model's file says" in caplog.text
    assert stored.manifest.recipe.stop_gradients == ("e",)
    given = run_step(cut(load_model(NAME), at=None, stop_gradients="e"), data)
    for name, array in run_step(stored, data).items():
        np.testing.assert_array_equal(array, given[name])
    assert np.abs(given["w1_grad"]).max() > 1e-3  # without the stop, it is 0


def test_a_stop_that_the_user_gives_too_is_made_once_and_not_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = cut(store(stop_gradients=["e"]), at=None, stop_gradients="e")
    assert bundle.manifest.recipe.stop_gradients == ("e",)
    assert "as the model's file says" not in caplog.text


def test_a_stored_parameter_is_frozen_and_the_option_that_trains_it_is_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = cut(store(freeze=["w1"]), at=None, stop_gradients="e")
    assert list_trained(bundle) == {"b1", "w2", "b2"}
    assert bundle.manifest.recipe.freeze == ("^w1$",)
    assert "'w1': not trained, as the model's file says" in caplog.text
    assert "--train '^w1$' changes this" in caplog.text


def test_what_the_user_trains_or_freezes_is_the_users(caplog: pytest.LogCaptureFixture) -> None:
    kept = cut(store(freeze=["w1", "b1"]), at=None, train=["w1"], stop_gradients="e")
    assert list_trained(kept) == {"w1", "w2", "b2"}
    assert kept.manifest.recipe.freeze == ("^b1$",)
    caplog.clear()
    cut(store(train=["w1"]), at=None, freeze=["w1"], stop_gradients="e")
    assert "as the model's file says" not in caplog.text


def test_a_constant_is_trained_if_the_file_says_so() -> None:
    model = store(train=["scale"])
    model.graph.initializer.append(numpy_helper.from_array(np.array([1.5], np.float32), "scale"))
    (output,) = model.graph.output
    node = next(node for node in model.graph.node if output.name in node.output)
    node.output[0] = "unscaled"
    model.graph.node.append(helper.make_node("Mul", ["unscaled", "scale"], [output.name]))
    bundle = cut(model, at=None, stop_gradients="e")
    assert "scale" in list_trained(bundle)
    assert bundle.manifest.recipe.train == ("^scale$",)


def test_a_tensor_that_is_gone_is_told(caplog: pytest.LogCaptureFixture) -> None:
    cut(store(freeze=["renamed"], stop_gradients=["gone"]), at=None)
    assert "how to train 'renamed', 'gone', but the model has no such tensors" in caplog.text


def test_a_stop_that_has_no_effect_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    bundle = cut(store(stop_gradients=["x"]), at=None)
    assert bundle.manifest.recipe.stop_gradients == ()
    assert "file says" not in caplog.text


def test_check_remarks_on_them_and_names_the_option() -> None:
    found = check(store(freeze=["w1"], stop_gradients=["e"]))
    remarks = [remark for remark in found.remarks if remark.kind is Kind.STORED_OPTIONS]
    assert [remark.names for remark in remarks] == [("w1",), ("e",)]
    assert [remark.options for remark in remarks] == [("--train '^w1$'",), ()]
    assert all(remark.kind is not Kind.LOST_DETACH for remark in found.remarks)


@pytest.mark.parametrize("text", ["1", "{", '{"freeze": "w1"}', '{"later": []}'])
def test_an_entry_that_is_not_valid_is_refused(text: str) -> None:
    model = load_model(NAME)
    model.metadata_props.add(key=KEY, value=text)
    with pytest.raises(UnsupportedModel, match=f"'{KEY}': it is not what this version"):
        cut(model, at=None)


def test_what_is_written_is_read() -> None:
    model, options = load_model(NAME), StoredOptions(train=("w1",), stop_gradients=("e",))
    write_stored(model, NONE_STORED)
    assert not model.metadata_props
    write_stored(model, options)
    assert read_stored(open_model(model)) == options


def test_nothing_stored_and_nothing_missing_needs_no_words() -> None:
    assert describe_stored(NONE_STORED) == []


@pytest.mark.parametrize("field", ["freeze", "train", "stop_gradients"])
def test_a_name_that_could_forge_lines_in_a_terminal_is_refused(field: str) -> None:
    with pytest.raises(UnsupportedModel, match="control characters") as caught:
        check(store(**{field: ["\x1b[2Jw\nremark: all is well"]}))
    assert str(caught.value).isprintable()
    model = load_model(NAME)
    model.metadata_props.add(key=KEY, value='{"\\u001b[2J": []}')
    with pytest.raises(UnsupportedModel, match="unknown field") as caught:
        check(model)
    assert str(caught.value).isprintable()


def test_a_weight_is_not_both_trained_and_frozen() -> None:
    with pytest.raises(UnsupportedModel, match="of 'w1' that the network trains it, and not"):
        cut(store(freeze=["w1"], train=["w1", "w2"]), at=None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"freeze": ["e"]}, "whether to train 'e', which is not stored in it as a weight"),
        ({"train": ["e", "x"]}, "whether to train 'e', 'x', which are not stored in it as weights"),
        ({"stop_gradients": ["w1"]}, "no gradient passes through 'w1'; this has no effect"),
        ({"stop_gradients": ["y"]}, "no gradient passes through 'y'; this has no effect"),
    ],
)
def test_an_option_that_has_no_effect_is_told(
    options: dict[str, list[str]], sentence: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = store(**options)
    told = [each for each in check(model).remarks if each.kind is Kind.STORED_OPTIONS]
    assert sentence in told[0].sentence
    bundle = cut(model, at=None)
    assert sentence in caplog.text
    assert list_trained(bundle) == {"w1", "b1", "w2", "b2"}
