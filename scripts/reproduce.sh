#!/usr/bin/env bash
# Repeats a published result in reproduced/ROW: scripts/reproduce.sh ROW [--seeds 1 2 3] [--common OVERRIDE ...]. Makes .venv
# first. Without arguments: the rows.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
# shellcheck source=scripts/venv.sh
source scripts/venv.sh
prepare_venv "[data]"
cd "$here"
(($#)) || set -- --help
row=$1
shift
exec "$root/.venv/bin/python" "$root/scripts/reproduce.py" "reproduced/$row" "$row" "$@"
