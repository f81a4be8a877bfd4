#!/usr/bin/env bash
# The gate: set-up, ruff, mypy, vermin (Python 3.9 is the oldest), pytest with MindFormers 1.3.0, which users have, and what
# touches MindFormers most again with 1.3.2. Arguments go to pytest: `bash tests/run.sh -k packing`.
#   MINDFORMERS=1.3.2 bash tests/run.sh    all tests with MindFormers 1.3.2
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh requirements.txt requirements-serve.txt tests/requirements.txt
ruff check .
ruff format --check --quiet .
mypy
vermin --quiet --no-tips --eval-annotations --target=3.9- --violations mindrlhf scripts examples ./*.py
other=$PWD/.venv/mindformers-1.3.2 # beside the environment's own MindFormers, whose requirements it shares
if [[ ! -e $other/mindformers/__init__.py ]]; then
  pip install --quiet --disable-pip-version-check --no-deps --target "$other" mindformers==1.3.2
fi
test_with() { # PATHS PYTEST-ARGUMENTS...: PATHS come first where Python looks for packages
  PYTHONPATH=$1 python -c 'import importlib.metadata as m; print("MindFormers", m.version("mindformers"))'
  PYTHONPATH=$1 python -m pytest -q -ra --durations=15 "${@:2}"
}
if [[ ${MINDFORMERS:-1.3.0} == 1.3.2 ]]; then
  test_with "$other:$PWD" "$@" tests
else
  test_with "$PWD" "$@" tests
  [[ $# -gt 0 ]] || test_with "$other:$PWD" tests/test_operators.py tests/test_lora.py
fi
