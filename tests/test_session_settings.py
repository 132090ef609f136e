"""The settings make an optimizing session compute what a quantized graph says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime

from splitonnx.session_settings import EXACT_SETTINGS
from tests.support.quantized_graphs import X, build_quantized, compute_quantized

ENGINES = Path(__file__).parent.parent / "runtime/js/src/engine/engines.ts"


def run(settings: Mapping[str, str]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    for entry in settings.items():
        options.add_session_config_entry(*entry)
    results: list[np.ndarray] = onnxruntime.InferenceSession(build_quantized(), options).run(
        ["shares", "twice"], {"x": X}
    )
    return results


def test_each_setting_is_needed_for_its_output() -> None:
    expected = compute_quantized(X)
    for name, exact, usual in zip(expected, run(EXACT_SETTINGS), run({}), strict=True):
        np.testing.assert_allclose(exact, expected[name], atol=1e-6)
        assert np.abs(usual - expected[name]).max() > 1e-2 * np.abs(expected[name]).max()
    for setting in EXACT_SETTINGS:
        others = {name: value for name, value in EXACT_SETTINGS.items() if name != setting}
        found = dict(zip(expected, run(others), strict=True))
        assert any(not np.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_the_client_in_typescript_has_the_same_settings() -> None:
    source = ENGINES.read_text(encoding="utf-8")
    for name, value in EXACT_SETTINGS.items():
        assert f'  {name.removeprefix("session.")}: "{value}",' in source
