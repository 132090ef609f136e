"""Define what all commands share: the form of ``--help``, and checks of the command line.

Each command's help has an example, and omits the value type of switches (options without a value).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from splitonnx.commands.arguments import refuse_ignored

EXAMPLES: Mapping[str, str] = MappingProxyType(
    {
        "check": "splitonnx check model.onnx",
        "adapt": "splitonnx adapt model.onnx --lora 'q_proj|v_proj' --rank 8 -o adapted.onnx",
        "inspect": "splitonnx inspect model.onnx --batch 32",
        "cut": "splitonnx cut model.onnx --at /layer1/Relu_output_0 --send-labels -o bundle",
        "explain": "splitonnx explain bundle/client --batch 32",
        "serve": "splitonnx serve bundle/server --port 8765",
        "token": "splitonnx token ana --token-file tokens",
        "sessions": "splitonnx sessions ws://127.0.0.1:8765",
        "train": "splitonnx train bundle/client --server ws://127.0.0.1:8765 --data train.npz",
        "evaluate": (
            "splitonnx evaluate bundle/client --server ws://127.0.0.1:8765 --data test.npz "
            "--metric f1"
        ),
        "predict": (
            "splitonnx predict bundle/client --server ws://127.0.0.1:8765 --data new.npz "
            "-o predicted.npz"
        ),
        "merge": "splitonnx merge bundle -o trained.onnx",
        "verify": "splitonnx verify bundle --data train.npz",
        "export": "splitonnx export bundle/client --for mobile",
    }
)
"""An example for each command, with the names that a user would choose."""


class Command(TyperCommand):
    """A command that refuses repeated options and empty values.

    Its ``--help`` omits the value type of switches (options without a value).
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line, and refuse repeated options and empty values."""
        refuse_ignored(self, ctx, args)
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, including ``--help``, and hide the value type of switches."""
        return _hide_types(super().get_params(ctx))


class Group(TyperGroup):
    """The group of all commands.

    As in :class:`Command`, ``--help`` omits the value type of switches (options without a value).
    """

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, including ``--help``, and hide the value type of switches."""
        return _hide_types(super().get_params(ctx))


def _hide_types(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        is_switch = isinstance(parameter, TyperOption) and parameter.is_flag
        if is_switch and parameter.metavar is None:
            parameter.metavar = ""
    return parameters


def show_version(is_asked: bool) -> None:
    """Print the installed version and exit if ``--version`` was given."""
    if is_asked:
        print(f"splitonnx {version('splitonnx')}")
        raise typer.Exit
