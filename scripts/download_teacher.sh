#!/usr/bin/env bash
# Fetches released checkpoints: bash scripts/download_teacher.sh NAME... [--dir FOLDER]; without arguments, lists the names.
source "$(dirname "$0")/env.sh"
python "$code/download_teacher.py" "$@"
