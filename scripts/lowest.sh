#!/usr/bin/env bash
# Installs the lowest versions that pyproject.toml allows into .venv-lowest and runs the tests there. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/venv.sh
source scripts/venv.sh
venv=${LOWEST_VENV:-.venv-lowest}
if [[ ! -x $venv/bin/python ]]; then
  "$(find_python)" -m venv "$venv"
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check packaging
# uv's resolution of lowest-direct, with pip alone: each requirement's lower bound as a constraint.
"$venv/bin/python" - >"$venv/constraints.txt" <<'PYTHON'
import tomllib

from packaging.requirements import Requirement

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
for requirement in map(Requirement, texts):
    for bound in requirement.specifier:
        if bound.operator == ">=":
            print(f"{requirement.name}=={bound.version}")
PYTHON
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$venv/constraints.txt" \
  --editable ".[dev]"
# Old versions warn of what is old about them, beside newer packages that they depend on; torch 2.11 warns when it reads
# a program back, and pandas 3.0 leaves files to the garbage collector.
"$venv/bin/python" -m pytest -W ignore::DeprecationWarning -W "ignore:The given buffer is not writable:UserWarning" \
  -W ignore::pytest.PytestUnraisableExceptionWarning "$@"
