"""Metrics as users name them: which exist, and which output they are computed from."""

from __future__ import annotations

import pytest

from splitonnx.errors import UsageError
from splitonnx.manifests import ScoredOutput
from splitonnx.runtime.client.metrics.choices import choose_metrics
from tests.support.scored_manifests import BINARY, CLASSES, VALUES, make_manifest

LOGITS = ScoredOutput(output="logits", labels="labels", kind=CLASSES, class_axis=1)
ONE = make_manifest(LOGITS, logits=("N", 10))
SEVERAL = make_manifest(
    ScoredOutput(output="logits", labels="labels", kind=CLASSES, class_axis=2, loss="words"),
    ScoredOutput(output="tags", labels="tagged", kind=BINARY, loss="tags.any"),
    ScoredOutput(output="box", labels="boxes", kind=VALUES, loss="box"),
    logits=("N", "T", 3),
    tags=("N", 4),
    box=("N", "T", 4),
)


@pytest.mark.parametrize("kind", ["f1", "precision", "recall"])
def test_an_average_stands_behind_a_dash(kind: str) -> None:
    plain, macro = choose_metrics([kind, f"{kind}-macro"], ONE)
    assert (plain.name, plain.kind, plain.average, plain.size) == (kind, kind, "", 10)
    assert (macro.name, macro.kind, macro.average) == (f"{kind}-macro", kind, "macro")


def test_top_k_has_its_number() -> None:
    (metric,) = choose_metrics(["top-5"], ONE)
    assert (metric.kind, metric.k) == ("top", 5)


def test_a_metric_that_is_named_twice_is_computed_once() -> None:
    assert [one.name for one in choose_metrics(["auc", "f1", "auc"], ONE)] == ["auc", "f1"]
    assert choose_metrics([], make_manifest()) == ()


@pytest.mark.parametrize(
    ("name", "output", "size"),
    [
        ("perplexity", "logits", 3),
        ("f1.words", "logits", 3),
        ("auc.tags.any", "tags", 4),
        ("mae", "box", 1),
        ("rmse.box", "box", 1),
    ],
)
def test_a_metric_finds_the_output_of_the_loss_that_it_fits(
    name: str, output: str, size: int
) -> None:
    (metric,) = choose_metrics([name], SEVERAL)
    assert (metric.name, metric.source.output, metric.size) == (name, output, size)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("f2", "there is no metric 'f2'; choose from accuracy, top-K"),
        ("top", "there is no metric 'top'"),
        ("top-0", "there is no metric 'top-0'"),
        ("top-x", "there is no metric 'top-x'"),
        ("top-²", "there is no metric"),
        ("auc-macro", "there is no metric 'auc-macro'"),
        ("auc-", "there is no metric 'auc-'"),
        ("f1-", "there is no metric 'f1-'"),
        ("top-10", "top-10 is always 1, because 'logits' has 10 classes"),
        ("mae", "mae is for mse or l1; this bundle has cross-entropy"),
        ("f1.logits", "f1.logits names no loss that it fits; choose from f1"),
    ],
)
def test_a_metric_that_does_not_fit_is_refused(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        choose_metrics([name], ONE)


def test_a_metric_that_may_mean_several_outputs_is_refused() -> None:
    with pytest.raises(UsageError, match=r"several outputs; choose from f1\.words, f1\.tags\.any"):
        choose_metrics(["f1"], SEVERAL)
    with pytest.raises(UsageError, match=r"it fits; choose from f1\.words, f1\.tags\.any"):
        choose_metrics(["f1.box"], SEVERAL)


def test_a_bundle_of_an_earlier_version_must_be_cut_again() -> None:
    with pytest.raises(UsageError, match="cut the model again"):
        choose_metrics(["f1"], make_manifest(logits=("N", 10)))


def test_one_text_is_not_a_list_of_names() -> None:
    with pytest.raises(UsageError, match=r"such as \['f1'\]"):
        choose_metrics("f1", ONE)
