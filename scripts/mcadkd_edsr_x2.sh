#!/usr/bin/env bash
# MCADKD/EDSR/x2 as published, MCADKD (ICCVW 2025 AIGENS); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --published MCADKD/EDSR/x2 "$@"
