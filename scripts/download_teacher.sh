#!/usr/bin/env bash
# Downloads released checkpoints: bash scripts/download_teacher.sh NAME... [--dir FOLDER]. Without names, lists them.
source "$(dirname "$0")/env.sh"
python "$code/download_teacher.py" "$@"
