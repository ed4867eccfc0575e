#!/usr/bin/env bash
# FAKD/SAN/x8/baseline as published, FAKD (ICIP 2020); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --published FAKD/SAN/x8/baseline "$@"
