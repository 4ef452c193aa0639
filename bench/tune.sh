#!/usr/bin/env bash
# The fastest tile of the row kernels on this GPU, see tune.py; arguments are handed to it.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH="kernels:.${PYTHONPATH:+:$PYTHONPATH}" exec python3 bench/tune.py "$@"
