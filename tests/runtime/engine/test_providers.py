"""Execution providers by name: which there are, what each needs, and what is refused."""

from __future__ import annotations

import pytest

from splitonnx.errors import UsageError, WrongRuntime
from splitonnx.runtime.engine.providers import (
    PROVIDERS,
    Provider,
    check_carried,
    check_target,
    choose_provider,
)


@pytest.mark.parametrize("name", ["cpu", "cuda", "openvino", "coreml", "dml"])
def test_a_provider_is_chosen_by_its_name(name: str) -> None:
    assert choose_provider(name) is PROVIDERS[name]
    assert str(choose_provider(name)) == name


def test_a_device_goes_to_the_setting_that_the_provider_has_for_it() -> None:
    gpu, second = choose_provider("openvino:GPU"), choose_provider("cuda:1")
    assert str(gpu) == "openvino:GPU"
    assert gpu.list_settings(None)["device_type"] == "GPU"
    assert second.list_settings(None)["device_id"] == "1"
    assert (second.device_number, choose_provider("cuda").device_number) == (1, 0)


def test_threads_go_to_a_provider_that_takes_them() -> None:
    assert PROVIDERS["openvino"].list_settings(3)["num_of_threads"] == "3"
    assert "num_of_threads" not in PROVIDERS["openvino"].list_settings(None)
    assert "3" not in PROVIDERS["cuda"].list_settings(3).values()


def test_no_provider_rounds_to_fewer_bits_by_itself() -> None:
    assert PROVIDERS["cuda"].settings["use_tf32"] == "0"
    assert PROVIDERS["openvino"].settings["precision"] == "ACCURACY"


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("gpu", "choose cpu, cuda, openvino, coreml or dml"),
        ("", "choose cpu"),
        ("cpu:1", "write --provider cpu"),
        ("cuda:", "cuda:1"),
        ("cuda:GPU", "cuda:1"),
        ("dml:-1", "dml:1"),
        ("openvino:", "openvino:GPU"),
    ],
)
def test_what_names_no_provider_or_no_device_is_refused_with_what_to_write(
    text: str, advice: str
) -> None:
    with pytest.raises(UsageError) as caught:
        choose_provider(text)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("cuda", "splitonnx[gpu]"),
        ("openvino", "splitonnx[openvino]"),
        ("coreml", "splitonnx[portable] (on macOS)"),
        ("dml", "onnxruntime-directml (on Windows)"),
    ],
)
def test_a_build_without_the_provider_is_named_with_what_it_has_and_what_to_install(
    name: str, package: str
) -> None:
    available = ["AzureExecutionProvider", "CPUExecutionProvider"]
    with pytest.raises(WrongRuntime) as caught:
        check_carried(PROVIDERS[name], available, "onnxruntime 1.32.0")
    assert str(caught.value) == (
        "the installed ONNX Runtime is onnxruntime 1.32.0, with cpu alone, but this needs the "
        f"provider {name}: install {package} in an environment of its own, since a second ONNX "
        "Runtime overwrites the first"
    )


def test_a_build_with_the_provider_is_taken() -> None:
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    check_carried(PROVIDERS["cuda"], available, "onnxruntime 1.32.0")


def test_parts_with_training_kernels_run_on_the_cpu_alone() -> None:
    check_target(PROVIDERS["cpu"], "server", "training")
    check_target(PROVIDERS["cuda"], "server", "portable")
    with pytest.raises(UsageError, match="--server-target portable"):
        check_target(PROVIDERS["cuda"], "server", "training")


def test_a_provider_is_a_value() -> None:
    one = Provider(name="x", runtime_name="X", package="x")
    assert one == Provider(name="x", runtime_name="X", package="x")
    assert one.list_settings(2) == {}
