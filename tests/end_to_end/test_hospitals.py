"""The example of three hospitals: its data, its model and its plans; ``make hospitals`` runs it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))


def test_each_sample_is_with_one_hospital_or_held_out_and_each_has_its_own_classes() -> None:
    hospitals = import_module("hospitals")
    for name, plan in hospitals.PLANS.items():
        _, labels = hospitals.load(name)
        parts, held_out = hospitals.divide(labels, plan, np.random.default_rng(0))
        everything = np.concatenate([*parts, held_out])
        assert sorted(everything) == list(range(len(labels)))
        for part, own in zip(parts, plan.favourites, strict=True):
            assert np.isin(labels[part], own).mean() > 0.85


def test_all_hospitals_make_their_steps_whatever_the_policy() -> None:
    hospitals = import_module("hospitals")
    for plan in hospitals.PLANS.values():
        assert plan.steps % plan.local_steps == plan.steps % plan.turn_steps == 0
        rounds = {policy: plan.list_options(policy)[-1] for policy in ("sequential", "splitfed-v1")}
        assert rounds["splitfed-v1"] * plan.local_steps == plan.steps
        assert rounds["sequential"] * plan.turn_steps == hospitals.HOSPITALS * plan.steps


def test_the_model_is_valid_and_the_last_accuracy_is_read(tmp_path: Path) -> None:
    hospitals = import_module("hospitals")
    random = np.random.default_rng(0)
    for model in (
        hospitals.build_perceptron(30, 2, random),
        hospitals.build_convolutions(64, 10, random),
    ):
        onnx.checker.check_model(model, full_check=True)
    lines = (
        '{"step": 1, "metrics": {"accuracy": 0.1}}\n{"epoch": 0, "metrics": {"accuracy": 0.5}}\n'
    )
    assert hospitals.read_accuracy(lines + '{"epoch": 1, "metrics": {"accuracy": 0.9}}') == 0.9
