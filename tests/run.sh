#!/usr/bin/env bash
# The gate: set-up, ruff, pytest. Arguments go to pytest: `bash tests/run.sh -k packing`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh requirements.txt tests/requirements.txt
ruff check .
PYTHONPATH=$PWD python -m pytest -q -ra --durations=15 "$@" tests
