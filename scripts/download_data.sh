#!/usr/bin/env bash
# Fetches DIV2K and the benchmark images: bash scripts/download_data.sh [DIV2K] [benchmark] [--dir_data DATA_ROOT]
# No change of folder here: a relative DATA_ROOT is one of the folder that the user stands in.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3

exec "$python" "$root/code/download.py" "$@"
