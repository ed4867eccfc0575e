#!/usr/bin/env bash
# Time and peak memory against the reference implementations, as a table, CSV and picture; arguments go to benchmark.py.
source "$(dirname "$0")/env.sh"
python "$code/benchmark.py" "$@"
