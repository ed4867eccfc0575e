#!/usr/bin/env bash
# DUKD: RCAN's student, 10 groups of 6 blocks, x2 (Zhang et al., 2023); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir dukd/rcan_x2 --scale 2 --template RCAN_student+DUKD_RCAN --teacher RCAN \
    --save_results --chop --patch_size 96 "$@"
