# shellcheck shell=bash
# Sourced by run.sh and test.sh: an environment in .venv with this project in it.

# Makes or updates the environment; does nothing when neither pyproject.toml nor the extras have changed.
# Arguments: the extras to install ("[onnx]" or "[dev]").
prepare_venv() {
  local extras=$1 stamp=.venv/installed project installed="" python
  project=$(cksum <pyproject.toml)
  [[ ! -f $stamp ]] || installed=$(<"$stamp")
  if [[ $installed == "$project $extras" || $installed == "$project [dev]" ]]; then  # [dev] has all the others
    return
  fi
  echo "installing into $PWD/.venv (needed once, and when pyproject.toml changes)" >&2
  if [[ ! -x .venv/bin/python ]]; then
    python=$(find_python)
    "$python" -m venv .venv
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extras}" >&2
  printf '%s\n' "$project $extras" >"$stamp"
}

# Prints the name of a Python that is new enough; ends the script where there is none.
find_python() {
  local name
  for name in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
    if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed, and python3 is $(python3 --version 2>&1 || true);" \
    "install one, or name it with PYTHON=/path/to/python" >&2
  exit 2
}
