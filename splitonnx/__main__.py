"""Run the command line with ``python -m splitonnx``."""

from splitonnx.commands import main

main()
