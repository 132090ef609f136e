"""Models left whole for comparison: one that many cuts of a network have in common is built once.

``verify`` builds it anew from every bundle.  Here each bundle's model is still restored, and only
one that equals an earlier one in every byte and every option is not cut a second time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import pytest

from splitonnx import verifications
from splitonnx.bundles import Bundle
from splitonnx.partitioner.graphs.transcripts import write_model
from splitonnx.partitioner.partitions import cut

_KNOWN: dict[tuple[str, ...], Bundle] = {}


def share_wholes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``leave_whole`` and ``verify`` build equal models once, until the end of a test."""
    monkeypatch.setattr(verifications, "cut", cut_once)


def cut_once(model: ir.Model, *, train: Sequence[str], **options: Any) -> Bundle:
    """Cut as ``cut`` does, but a model with the same bytes and options only once."""
    content = write_model(model).SerializeToString(deterministic=True)
    others = (f"{name}={value!r}" for name, value in sorted(options.items()))
    key = (hashlib.sha256(content).hexdigest(), *sorted(train), *others)
    if key not in _KNOWN:
        _KNOWN[key] = cut(model, train=train, **options)
    return _KNOWN[key]
