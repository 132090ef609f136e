"""Fixtures that tests of the commands share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import splitonnx
from splitonnx.bundles import Bundle
from splitonnx.runtime.server.servers import Server
from tests.support.commands import AT, MODEL, SAMPLES, TAIL_AT, Command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.npz"
    random = np.random.default_rng(0)
    image = random.random((SAMPLES, 1, 8, 8), np.float32)
    np.savez(path, image=image, labels=random.integers(0, 10, SAMPLES))
    return path


@pytest.fixture(scope="session")
def cut_once() -> Bundle:
    return splitonnx.cut(MODEL, at=AT, tail_at=TAIL_AT)


@pytest.fixture
def bundle(cut_once: Bundle, tmp_path: Path) -> Path:
    cut_once.save(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def url(bundle: Path) -> Iterator[str]:
    with Server(bundle / "server", port=0, threads=1) as server:
        yield server.url
