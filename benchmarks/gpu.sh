#!/usr/bin/env bash
# What only a GPU can show, in nine minutes at most: bash benchmarks/gpu.sh [--output DIR]; --help lists the flags.
# PYTHON is the interpreter; by default that of .venv if `make` has made it, else python3.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; fi
fi
exec "$PYTHON" "$root/benchmarks/gpu.py" "$@"
