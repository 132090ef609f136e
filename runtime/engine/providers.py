"""Execution providers: the parts of ONNX Runtime that compute on a particular device.

This module knows the providers by name, which package carries each, and which settings each needs
to compute in the precision that the graphs declare.  It does not use ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from splitonnx.errors import UsageError, WrongRuntime
from splitonnx.names import PORTABLE

CPU = "cpu"
"""The provider that every build has, and that runs what the others leave."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    """An execution provider, and how sessions on it are opened.

    ``runtime_name`` is ONNX Runtime's name of it, and ``package`` what installs a build that has
    it.  ``device`` is the device that the user chose, or empty; ``device_setting`` and
    ``thread_setting`` are the names of the provider's settings for it and for the number of
    threads, or empty.  ``memory`` is ONNX Runtime's name of the device's memory if tensors stay
    there between stages, or empty if they stay in the host's.  ``is_optimized`` means that ONNX
    Runtime optimizes graphs before the provider gets them.
    """

    name: str
    runtime_name: str
    package: str
    settings: Mapping[str, str] = field(default_factory=dict)
    device: str = ""
    device_setting: str = ""
    thread_setting: str = ""
    memory: str = ""
    is_optimized: bool = True
    has_memory_patterns: bool = True

    def list_settings(self, threads: int | None) -> dict[str, str]:
        """Return the provider's settings, with the chosen device and number of threads."""
        chosen = dict(self.settings)
        if self.device:
            chosen[self.device_setting] = self.device
        if self.thread_setting and threads is not None:
            chosen[self.thread_setting] = str(threads)
        return chosen

    @property
    def device_number(self) -> int:
        """Return the number of the chosen device, or 0."""
        return int(self.device) if self.device.isdecimal() else 0

    def __str__(self) -> str:
        return f"{self.name}:{self.device}" if self.device else self.name


PROVIDERS: Mapping[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(name=CPU, runtime_name="CPUExecutionProvider", package="splitonnx[portable]"),
        Provider(
            name="cuda",
            runtime_name="CUDAExecutionProvider",
            package="splitonnx[gpu]",
            settings={"use_tf32": "0"},  # TF32 rounds to 10 bits
            device_setting="device_id",
            memory="cuda",
        ),
        Provider(
            name="openvino",
            runtime_name="OpenVINOExecutionProvider",
            package="splitonnx[openvino]",
            # otherwise a GPU computes in 16 bits
            settings={"device_type": "CPU", "precision": "ACCURACY"},
            device_setting="device_type",
            thread_setting="num_of_threads",
            is_optimized=False,  # optimized graphs come back from it with cycles
        ),
        Provider(
            name="coreml",
            runtime_name="CoreMLExecutionProvider",
            package="splitonnx[portable] (on macOS)",
        ),
        Provider(
            name="dml",
            runtime_name="DmlExecutionProvider",
            package="onnxruntime-directml (on Windows)",
            device_setting="device_id",
            has_memory_patterns=False,  # DirectML refuses them
        ),
    )
}
"""Every provider that can be chosen, by its name."""


def choose_provider(text: str) -> Provider:
    """Return the provider that ``NAME`` or ``NAME:DEVICE`` stands for.

    Raises:
        UsageError: there is no such provider, or it does not let the user choose its device.
    """
    name, colon, device = text.partition(":")
    provider = PROVIDERS.get(name)
    if provider is None:
        raise UsageError(f"there is no provider '{name}'; choose {_list_names(PROVIDERS)}")
    if not colon:
        return provider
    if not provider.device_setting:
        raise UsageError(f"the provider {name} has no device to choose; write --provider {name}")
    is_number = provider.device_setting == "device_id"
    if not device or (is_number and not (device.isascii() and device.isdecimal())):
        example = "1" if is_number else "GPU"
        raise UsageError(f"'{text}' does not name a device; write for example {name}:{example}")
    return replace(provider, device=device)


def check_carried(provider: Provider, available: Iterable[str], installed: str) -> None:
    """Check that the installed ONNX Runtime, which has ``available`` providers, has this one.

    Raises:
        WrongRuntime: it does not have it.
    """
    available = set(available)
    if provider.runtime_name in available:
        return
    names = [kind.name for kind in PROVIDERS.values() if kind.runtime_name in available]
    raise WrongRuntime(
        f"{installed}, with {_list_names(names, last='and')} alone",
        f"the provider {provider.name}: install {provider.package} in an environment of its own, "
        "since a second ONNX Runtime overwrites the first",
    )


def check_target(provider: Provider, party: str, target: str) -> None:
    """Check that the provider can run the graphs of a part with this target.

    Raises:
        UsageError: it cannot, because they have training operators.
    """
    if provider.name != CPU and target != PORTABLE:
        raise UsageError(
            f"this part was cut with the target {target}, which has kernels for the CPU only, not "
            f"for the provider {provider}; cut the model with --{party}-target portable"
        )


def _list_names(names: Iterable[str], last: str = "or") -> str:
    *first, end = names
    return f"{', '.join(first)} {last} {end}" if first else end
