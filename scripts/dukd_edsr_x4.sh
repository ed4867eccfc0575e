#!/usr/bin/env bash
# DUKD: EDSR's student, 32 blocks of 64 channels, x4 (Zhang et al., 2023); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir dukd/edsr_x4 --scale 4 --template EDSR_DUKD+DUKD --teacher EDSR \
    --save_results --chop --patch_size 192 "$@"
