#!/usr/bin/env bash
# From a bare machine to a search: makes .venv, installs the project, runs amc-search with the arguments given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/venv.sh
source scripts/venv.sh
prepare_venv ""
exec .venv/bin/amc-search "$@"
