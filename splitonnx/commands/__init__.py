"""The command line: ``splitonnx check | inspect | cut | explain | serve | token | train | ...``.

Each command is a thin wrapper around a function of the library.  A command imports most modules
only when it runs, so that ``--help`` is fast and a device can train without ``onnx``.  Errors that
splitonnx raises on purpose are printed as one line on stderr, and the exit code is 2.  After
Ctrl-C, the exit code is 130.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from splitonnx.commands import (
    adaptations,
    disclosures,
    evaluations,
    outputs,
    partitions,
    security,
    services,
    sessions,
    trainings,
)
from splitonnx.commands.helping import EXAMPLES, Command, Group, show_version
from splitonnx.commands.logs import escape, silencing
from splitonnx.commands.streams import (
    discard_unprinted,
    explain_failed_print,
    replace_closed_streams,
)
from splitonnx.errors import SplitonnxError
from splitonnx.faults import LOGGER
from splitonnx.imports import UNUSED, postpone
from splitonnx.interrupts import keep_exit_code, noting_interrupts

TRACEBACK = "SPLITONNX_TRACEBACK"
"""If this environment variable is set, errors are shown with their traceback."""

app = typer.Typer(
    name="splitonnx",
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    partitions.check,
    partitions.inspect,
    adaptations.adapt,
    partitions.cut,
    disclosures.explain,
    services.serve,
    security.token,
    sessions.sessions,
    trainings.train,
    evaluations.evaluate,
    services.predict,
    outputs.merge,
    partitions.verify,
    outputs.export,
):
    app.command(cls=Command, epilog=f"Example: {EXAMPLES[command.__name__]}")(command)


@app.callback()
def show_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=show_version, is_eager=True, help="Show the version."
        ),
    ] = False,
) -> None:
    """Split learning on ONNX: cut a model into two parts and train them on different machines."""


def main() -> None:
    """Run the command line; this is the entry point of ``splitonnx``."""
    replace_closed_streams()
    postpone(*UNUSED)
    try:
        with noting_interrupts(), silencing("onnx_ir", LOGGER):
            code = app(prog_name="splitonnx", standalone_mode=False)
        sys.stdout.flush()
    except SplitonnxError as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        _fail(str(error))
    except OSError as error:
        reason = explain_failed_print(error)
        if reason is None:
            raise
        discard_unprinted(sys.stdout)
        _fail(f"what a command prints cannot be written: {reason}")
    except (KeyboardInterrupt, typer.Abort):
        keep_exit_code()
        sys.exit(130)
    except Exception as error:  # noqa: BLE001
        # the class of typer's usage errors is private, but each can format its message
        describe = getattr(error, "format_message", None)
        if describe is None:
            _own_up(error)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(describe())
            sys.exit(2)
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "splitonnx"
        sentence = describe().replace("Value error, ", "")  # which pydantic puts before the reason
        _fail(f"{sentence.rstrip('.')} (see {command} --help)")
    sys.exit(code if isinstance(code, int) else 0)


def _own_up(error: Exception) -> NoReturn:
    """Print that an error is a bug in splitonnx and how to see its traceback, and exit."""
    if os.environ.get(TRACEBACK):
        traceback.print_exc()
    _fail(
        f"a mistake in splitonnx ({type(error).__name__}: {error}); please report it, with the "
        f"traceback that {TRACEBACK}=1 shows"
    )


def _fail(sentence: str) -> NoReturn:
    try:
        print(f"splitonnx: {escape(' '.join(sentence.split()))}", file=sys.stderr, flush=True)
    except OSError:  # only the exit code can be reported
        discard_unprinted(sys.stderr)
    sys.exit(2)
