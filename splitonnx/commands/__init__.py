"""The command line: ``splitonnx check | inspect | cut | serve | token | train | predict | ...``.

Each command is a thin shell around a call of the library; what it imports, it imports when it
runs, so that ``--help`` is quick and a device's commands need no ``onnx``.  An error of
splitonnx becomes one line on stderr and exit code 2, an interrupt exit code 130.
"""

from __future__ import annotations

import logging
import sys
from typing import NoReturn

import typer

from splitonnx.commands import partitions, security, services, trainings
from splitonnx.errors import SplitonnxError

app = typer.Typer(
    name="splitonnx",
    help="Split learning on ONNX: cut any model, train its parts apart, exactly as the whole.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    partitions.check,
    partitions.inspect,
    partitions.cut,
    services.serve,
    security.token,
    trainings.train,
    services.predict,
    partitions.merge,
    partitions.verify,
    partitions.export,
):
    app.command()(command)


def main() -> None:
    """Run the command line; the entry point of ``splitonnx``."""
    logging.getLogger("onnx_ir").addHandler(logging.NullHandler())  # it has no say on stderr
    try:
        code = app(prog_name="splitonnx", standalone_mode=False)
    except SplitonnxError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:
        # typer keeps the class of its usage errors to itself, but each can show itself
        describe = getattr(error, "format_message", None)
        if describe is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(describe())
            sys.exit(2)
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "splitonnx"
        _fail(f"{describe().rstrip('.')} (see {command} --help)")
    sys.exit(code if isinstance(code, int) else 0)


def _fail(sentence: str) -> NoReturn:
    print(f"splitonnx: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(2)
