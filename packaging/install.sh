#!/bin/sh
# Install the server into a virtual environment of its own, from the lock file and nothing else.
#   packaging/install.sh training|portable FOLDER
# It runs in the folder of the sources.  The Containerfile and tests/support/container_steps.py share it.
set -eu
kind=$1
folder=$2
case $kind in
  training | portable) ;;
  *) echo "RUNTIME is 'training' or 'portable', not '$kind'" >&2; exit 2 ;;
esac
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --no-cache-dir --require-hashes --only-binary :all: \
  -r "requirements/serve-$kind.txt"
"$folder/bin/python" -m pip install --quiet --no-cache-dir --no-deps --no-build-isolation .
# what only installing takes
"$folder/bin/python" -m pip uninstall --quiet --yes setuptools pip
"$folder/bin/splitonnx" --help >/dev/null
