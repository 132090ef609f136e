"""The remark on how much a codec changes predictions."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import splitonnx
from splitonnx.partitioner.cutting.transforms.codec_errors import describe_codec_error
from splitonnx.partitioner.cutting.transforms.crossings import encode_crossings
from splitonnx.partitioner.merges import merge
from splitonnx.wire_codecs import read_wire
from tests.support.links import make_bundle
from tests.support.zoo import ZOO


def measure(wire: str) -> float:
    plain = make_bundle()
    encoded = encode_crossings(plain, read_wire(wire))
    (remark,) = describe_codec_error(plain, encoded, wire, partial(merge, plain))
    assert remark.startswith(f"--wire {wire} changes predictions from random inputs by ")
    return float(remark.split()[-4])


def test_the_error_is_that_of_the_codec() -> None:
    errors = [measure(wire) for wire in ("fp16", "bf16", "int8", "topk=0.5")]
    assert errors == sorted(errors)
    assert errors[0] < 2.0**-11
    assert errors[1] < 2.0**-8
    assert 0.01 < errors[3] < 1


def test_a_codec_of_gradients_alone_changes_no_prediction() -> None:
    assert measure("bwd=int8") == 0


def test_a_large_model_is_neither_merged_nor_run() -> None:
    plain = make_bundle()
    large = np.broadcast_to(np.float32(0), (1 << 24) + 1)
    client = replace(plain.client, weights={**plain.client.weights, "w": large})
    bundle = replace(plain, parties={**plain.parties, "client": client})
    assert not list(describe_codec_error(bundle, plain, "int8", partial(pytest.fail, "merged")))


def test_cut_compares_the_parts_without_codec_and_says_what_the_codec_changes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPLITONNX_NO_CHECK", raising=False)
    with caplog.at_level(logging.WARNING):
        bundle = splitonnx.cut(
            ZOO["chain"].build(), at="act1", send_labels=True, wire={"fwd": "topk=0.4"}
        )
    assert bundle.manifest.recipe.wire == "fwd=topk=0.4,bwd=fp32"
    (remark,) = [r for r in caplog.messages if "codec" in r or "--wire" in r]
    assert re.fullmatch(
        r"--wire fwd=topk=0.4,bwd=fp32 changes .* by [0-9.e-]+ of their norm", remark
    )
    caplog.clear()
    splitonnx.cut(ZOO["chain"].build(), at="act1", send_labels=True, wire="int8", check=False)
    assert not caplog.messages
    assert np.isfinite(measure("int8"))
