"""Errors in the environment: missing packages, failed processes or stages, and invalid options."""

from __future__ import annotations

from dataclasses import dataclass

from splitonnx.errors.roots import SplitonnxError, flatten


@dataclass(eq=False)
class MissingExtra(SplitonnxError):
    """An optional package is missing; an extra of splitonnx installs it.

    ``is_available`` means that all packages of the extra have wheels for this version of Python and
    this machine.
    """

    module: str
    extra: str
    purpose: str
    is_available: bool = True

    def __str__(self) -> str:
        missing = f"{self.purpose} needs '{self.module}', which is not installed"
        if self.is_available:
            return f"{missing}; run: pip install 'splitonnx[{self.extra}]'"
        return (
            f"{missing}; onnxruntime-training has wheels for Python 3.11 and 3.12 on x86-64 and "
            "macOS alone: cut the model on such a machine, and train its parts here with "
            "'splitonnx[portable]'"
        )


@dataclass(eq=False)
class TorchNeeded(SplitonnxError):
    """PyTorch, or a package that its exporter needs, is missing or too old.

    splitonnx never installs PyTorch, because the user chooses its build.  ``found`` is the
    installed version, or empty if the package is missing.
    """

    purpose: str
    package: str
    needed: str
    found: str = ""

    def __str__(self) -> str:
        found = f"{self.found} is installed" if self.found else "it is not installed"
        return (
            f"{self.purpose} needs {self.package} {self.needed}".rstrip()
            + f", but {found}; splitonnx does not install it: run pip install '{self.package}"
            f"{self.needed}' in the environment of the network"
        )


@dataclass(eq=False)
class WrongRuntime(SplitonnxError):
    """The installed ONNX Runtime package lacks a required feature; another package is needed."""

    installed: str
    needed: str

    def __str__(self) -> str:
        return f"the installed ONNX Runtime is {self.installed}, but this needs {self.needed}"


@dataclass(eq=False)
class ProcessFailed(SplitonnxError):
    """The separate process that runs native code cannot be started."""

    module: str
    reason: str

    def __str__(self) -> str:
        return (
            f"no process can be started for native code ({self.reason}); "
            f"see what `python -m {self.module}` says"
        )


@dataclass(eq=False)
class UsageError(SplitonnxError):
    """Options or arguments contradict each other or are out of range."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False)
class StageFailed(SplitonnxError):
    """ONNX Runtime could not load or run a stage."""

    stage: str
    reason: str

    def __str__(self) -> str:
        return f"stage '{self.stage}' failed: {self.reason}"


@dataclass(eq=False)
class InternalRuntimeError(SplitonnxError):
    """A client or a server failed because of a bug in splitonnx."""

    subject: str
    reason: str

    def __str__(self) -> str:
        return (
            "a mistake in splitonnx, not in the model or the data: "
            f"{flatten(self.subject)} failed ({flatten(self.reason)}); please report it, with the "
            "traceback that a server logs, or that SPLITONNX_TRACEBACK=1 shows"
        )


@dataclass(eq=False)
class StageTooSlow(SplitonnxError):
    """A stage was stopped because it exceeded its time limit.

    The interrupted task did not change the party's state.
    """

    stage: str
    seconds: float

    def __str__(self) -> str:
        return (
            f"stage '{self.stage}' was ended: it ran for longer than {self.seconds:g} s; make the "
            "batch smaller, or serve with a larger --max-stage-seconds"
        )


@dataclass(eq=False)
class StageStopped(SplitonnxError):
    """A stage was stopped because its process is shutting down."""

    stage: str

    def __str__(self) -> str:
        return f"stage '{self.stage}' was ended: the server stops"
