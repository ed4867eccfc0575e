#!/usr/bin/env bash
# CSD/EDSR/x4/0.5 as published, CSD (IJCAI 2021); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --published CSD/EDSR/x4/0.5 "$@"
