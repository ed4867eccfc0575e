#!/usr/bin/env bash
# DUKD/EDSR/x2 as published, DUKD (arXiv 2309.14162); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --published DUKD/EDSR/x2 "$@"
