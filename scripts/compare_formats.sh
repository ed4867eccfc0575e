#!/usr/bin/env bash
# Compares the formats of export.py for several checkpoints: difference to PyTorch, file size, time on one core, PSNR; writes
# a CSV file. Arguments go to compare_formats.py.
source "$(dirname "$0")/env.sh"
OMP_NUM_THREADS=1 python "$code/compare_formats.py" "$@"
