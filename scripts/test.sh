#!/usr/bin/env bash
# All that CI checks: lint, format, types, the documentation site, tests on up to four cores. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/venv.sh
source scripts/venv.sh
prepare_venv "[dev]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
.venv/bin/pytest --numprocesses auto --maxprocesses 4 --dist worksteal "$@"
