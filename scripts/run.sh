#!/usr/bin/env bash
# From a bare machine to a search: makes .venv, installs the project, runs amc-search with the arguments given, in
# the folder that it was called from, or a demonstration without any. ONNX is installed and exported as well, and what reads
# data sets is installed.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/venv.sh
source scripts/venv.sh
prepare_venv "[data,onnx]"
export PATH="$PWD/.venv/bin:$PATH"
cd "$here"
# Without arguments: a vision transformer at 30% of its MACs, where layers differ enough for a search to show.
(($#)) || set -- model=digits_vit budget.ratio=0.3 search.episodes=100
exec amc-search 'export=[safetensors,pt2,onnx]' "$@"
