#!/usr/bin/env bash
# DUKD: RCAN's student, 10 groups of 6 blocks, x4 (Zhang et al., 2023); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir dukd/rcan_x4 --scale 4 --template RCAN_student+DUKD_RCAN --teacher RCAN \
    --save_results --chop --patch_size 192 "$@"
