#!/usr/bin/env bash
# Compares time and peak memory with the reference implementations in a table, a CSV file and a picture.
# Arguments go to benchmark.py.
source "$(dirname "$0")/env.sh"
python "$code/benchmark.py" "$@"
