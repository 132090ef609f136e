"""``python -m splitonnx`` is the command line."""

from splitonnx.commands import main

main()
