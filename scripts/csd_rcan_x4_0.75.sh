#!/usr/bin/env bash
# CSD/RCAN/x4/0.75 as published, CSD (IJCAI 2021); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --published CSD/RCAN/x4/0.75 "$@"
