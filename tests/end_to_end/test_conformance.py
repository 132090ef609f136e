"""Models of the zoo, exports and onnx's own networks compute, once they are cut, as given."""

from __future__ import annotations

import logging

import onnx
import pytest

from splitonnx.partitioner.partitions import cut
from tests.conftest import ROOT
from tests.support.onnx_models import LIGHT, load_light
from tests.support.zoo import ZOO

EXPORTS = sorted(path.stem for path in (ROOT / "tests" / "exports").glob("*.onnx"))
OTHER_REMARKS = ("torch.onnx.export(", "squashed twice")
"""Parts of what ``cut`` says of a model before it is compared: what to export otherwise."""
QUICK = ("light_shufflenet", "light_squeezenet")


@pytest.mark.parametrize("name", ZOO)
def test_a_model_of_the_zoo_is_the_model_given(name: str, caplog: pytest.LogCaptureFixture) -> None:
    entry = ZOO[name]
    cut(entry.build(), at=entry.several or None, loss=entry.loss, check=True)
    assert not caplog.records


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_is_the_model_given(name: str, caplog: pytest.LogCaptureFixture) -> None:
    loss = "mse" if name == "sklearn-regressor" else "cross-entropy"
    cut(onnx.load(ROOT / "tests" / "exports" / f"{name}.onnx"), at=None, loss=loss, check=True)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [text for text in told if not any(part in text for part in OTHER_REMARKS)]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.sweep) for n in LIGHT]
)
def test_a_network_of_onnx_is_the_model_given(name: str, caplog: pytest.LogCaptureFixture) -> None:
    cut(load_light(name), at=None, check=True)
    assert not caplog.records
