#!/usr/bin/env bash
# MCADKD: EDSR's baseline as the student, x2 (Ko et al., ICCVW 2025); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir mcadkd/edsr_x2 --scale 2 --template EDSR_baseline+MCADKD --teacher EDSR \
    --save_results --chop --patch_size 96 "$@"
