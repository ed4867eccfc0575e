#!/usr/bin/env bash
# DCKD: RCAN's student, 10 groups of 6 blocks, x4 (Zhou et al., AAAI 2025); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir dckd/rcan_x4 --scale 4 --template RCAN_student+DCKD --teacher RCAN \
    --save_results --chop --patch_size 192 "$@"
