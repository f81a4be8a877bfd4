#!/usr/bin/env bash
# The gate: set-up, ruff, mypy, vermin (Python 3.9 is the oldest), pytest with MindFormers 1.3.0, which users have, and what
# touches MindFormers most again with 1.3.2. The tests run in two processes beside each other, each in the same order every
# time. Arguments go to pytest, and then there is one process: `bash tests/run.sh -k packing`.
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
paths=$PWD
[[ ${MINDFORMERS:-1.3.0} != 1.3.2 ]] || paths=$other:$PWD
if [[ $# -gt 0 ]]; then
  test_with "$paths" "$@" tests
  exit
fi
# The first process begins with eight workers on two cores, and goes on with two at a time. The second one computes meanwhile
# in itself, and starts processes only at its end: MindSpore's workers do not find each other on a machine that is too busy.
first=(tests/test_{rig,two_machines}.py tests/faults tests/test_{quickstart,training,launcher,settings_arrive}.py)
last=(tests/test_{documents,check,identity,locks,preprocess,reference,ecosystem,arrival,serve,resume}.py)
between=()
for file in tests/test_*.py; do
  [[ " ${first[*]} ${last[*]} " == *" $file "* ]] || between+=("$file")
done
log=$(mktemp) status=0
set -m # a process group, which heeds signals and can be ended as a whole
test_with "$paths" "${first[@]}" > "$log" 2>&1 < /dev/null &
half=$!
set +m
trap 'kill -- -$half 2> /dev/null || true; rm -f "$log"' EXIT
test_with "$paths" "${between[@]}" "${last[@]}" || status=$?
[[ $paths != "$PWD" ]] || test_with "$other:$PWD" -k "not sampling and not resumed" tests/test_{operators,lora}.py || status=$?
wait "$half" || status=$?
cat "$log"
exit "$status"
