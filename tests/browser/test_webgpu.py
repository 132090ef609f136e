"""A page that trains on WebGPU, by Chromium's software adapter, as a Python client does."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from splitonnx import Client, Server
from splitonnx.bundles import PartyBundle
from tests.browser.conftest import UNOPTIMIZED
from tests.conftest import ROOT
from tests.support.browsers import PATIENCE, cut_digits, launching_chromium, read_digits

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Playwright

pytestmark = pytest.mark.browser

JS = ROOT / "runtime" / "js"
PAGE = "<!doctype html><title>GPU</title><script type=module src=gpu.js></script>"
BATCH = 32
STEPS = 4
AGREEMENT = 1e-5
"""Between a GPU's arithmetic and that of a Python client's ONNX Runtime."""
BUILDS = {"onnxruntime-web/webgpu": "asyncify", "onnxruntime-web": "jsep"}
"""What an app imports, and which of ONNX Runtime's files of WebAssembly goes with it."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What came of a pass: a loss for each step, this part's state, and the error if any."""

    losses: list[float]
    state: dict[str, np.ndarray]
    error: str = ""


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    """Chromium with WebGPU: without a GPU, by SwiftShader."""
    with launching_chromium(playwright, UNOPTIMIZED, "--enable-unsafe-webgpu") as chromium:
        yield chromium


def build_page(folder: Path, name: str) -> Path:
    """Build the page with a build of ONNX Runtime."""
    command: list[str | Path] = [
        JS / "node_modules" / ".bin" / "esbuild",
        JS / "tests" / "pages" / "gpu.ts",
        "--bundle",
        "--format=esm",
        "--log-level=error",
        f"--outfile={folder / 'page' / 'gpu.js'}",
        f"--alias:onnxruntime-web/webgpu={name}",
    ]
    subprocess.run(command, check=True, cwd=JS)
    (folder / "page" / "index.html").write_text(PAGE)
    wasm = f"ort-wasm-simd-threaded.{BUILDS[name]}.wasm"
    shutil.copy(JS / "node_modules" / "onnxruntime-web" / "dist" / wasm, folder / "page")
    return folder / "page"


@contextmanager
def open_page(browser: Browser, folder: Path, bundle: Path) -> Iterator[Page]:
    """Open a page of the bundle's server."""
    with (
        Server(bundle / "server", port=0, client=bundle / "client", web=folder) as server,
        browser.new_context() as context,
    ):
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.goto(server.url.replace("ws", "http", 1))
        page.wait_for_function("'train' in window")
        if not page.evaluate("hasAdapter()"):
            pytest.skip("this Chromium has no adapter for WebGPU, not even SwiftShader")
        yield page


def read_samples() -> dict[str, np.ndarray]:
    training, _ = read_digits()
    return {name: array[: BATCH * STEPS] for name, array in training.items()}


def train_there(page: Page, place: str) -> Training:
    """Train on the GPU, which is to leave what the stages give at a place."""
    samples = read_samples()
    given = [
        {"images": samples["image"].ravel().tolist(), "labels": samples["labels"].tolist()},
        {"executionProviders": ["webgpu"], "preferredOutputLocation": place},
    ]
    made = page.evaluate("([samples, options]) => train(samples, options)", given)
    state = {
        name: np.array(array["data"]).reshape(array["dims"])
        for name, array in made["state"].items()
    }
    return Training(losses=made["losses"], state=state, error=made["error"])


def train_here(bundle: Path) -> Training:
    with (
        Server(bundle / "server", port=0) as server,
        Client(bundle / "client", server.url) as client,
    ):
        history = client.fit(read_samples(), batch_size=BATCH)
        return Training(losses=[step.loss for step in history.steps], state=client.state())


def test_a_page_trains_on_webgpu_as_a_python_client_does(
    browser: Browser, own: Path, tmp_path: Path
) -> None:
    with open_page(browser, build_page(tmp_path, "onnxruntime-web/webgpu"), own) as page:
        trainings = [train_there(page, place) for place in ("cpu", "gpu-buffer")]
    expected = train_here(own)
    for made in trainings:
        assert made.error == ""
        assert len(made.losses) == STEPS
        np.testing.assert_allclose(made.losses, expected.losses, rtol=0, atol=AGREEMENT)
        assert made.state.keys() == expected.state.keys()
        for name, array in expected.state.items():
            np.testing.assert_allclose(made.state[name], array, rtol=0, atol=AGREEMENT)


def test_a_kernel_that_the_gpu_refuses_ends_training_and_changes_nothing(
    browser: Browser, tmp_path: Path
) -> None:
    # This build joins the nine places of a 3x3 kernel at once, which takes more buffers than it
    # asks the device for; then it only complains in the console, and gives out numbers.
    bundle = cut_digits(tmp_path, tail_at=())
    with open_page(browser, build_page(tmp_path, "onnxruntime-web"), bundle) as page:
        made = train_there(page, "cpu")
    assert made.error.startswith("StageFailed: stage 'head.backward' failed: the GPU refuses")
    assert "storage buffers" in made.error
    assert made.losses == []
    for name, array in PartyBundle.load(bundle / "client").state().items():
        np.testing.assert_array_equal(made.state[name], array)
