# Sourced by quickstart.sh and tests/run.sh in the project's folder: install the given requirements in .venv, and activate it.
#   source scripts/setup.sh requirements.txt [more.txt]
for python in python3.11 python3 python; do
  if "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2> /dev/null; then break; fi
  python=
done
if [[ ! -x .venv/bin/python ]]; then
  [[ -n $python ]] || { echo "error: Python 3.11 is needed and was not found on the PATH" >&2; exit 2; }
  echo "making .venv"
  "$python" -m venv .venv || { echo "error: .venv cannot be made; Debian and Ubuntu need python3.11-venv" >&2; exit 2; }
fi
source .venv/bin/activate
wanted=$(cat "$@")
if [[ "$(cat .venv/installed.txt 2> /dev/null)" != *"$wanted"* ]]; then
  echo "installing $* into .venv (about a minute)"
  pip install --quiet --disable-pip-version-check $(printf -- '-r %s ' "$@") || {
    echo "error: the installation failed; see the message above" >&2; exit 2; }
  echo "$wanted" > .venv/installed.txt
fi
