"""The command line: ``splitonnx inspect | cut | serve | train | predict | merge | verify``.

Each command is a thin shell around a call of the library; what it imports, it imports when it
runs, so that ``--help`` is quick and a device's commands need no ``onnx``.  An error of
splitonnx becomes one line on stderr and exit code 2, an interrupt exit code 130.
"""

from __future__ import annotations

import sys

import typer

from splitonnx.commands import partitions, services, trainings
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
    partitions.inspect,
    partitions.cut,
    services.serve,
    trainings.train,
    services.predict,
    partitions.merge,
    partitions.verify,
):
    app.command()(command)


def main() -> None:
    """Run the command line; the entry point of ``splitonnx``."""
    try:
        app(prog_name="splitonnx")
    except SplitonnxError as error:
        print(f"splitonnx: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
