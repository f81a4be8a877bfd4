#!/usr/bin/env bash
# The gate: set-up, ruff, vermin (Python 3.9 is the oldest), pytest. Arguments go to pytest: `bash tests/run.sh -k packing`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh requirements.txt tests/requirements.txt
ruff check .
vermin --quiet --no-tips --eval-annotations --target=3.9- --violations mindrlhf scripts examples ./*.py
PYTHONPATH=$PWD python -m pytest -q -ra --durations=15 "$@" tests
