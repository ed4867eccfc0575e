#!/usr/bin/env bash
# CSD: a quarter of EDSR's channels learns beside the whole, x2 (Wang et al., IJCAI 2021); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir csd/edsr_x2 --scale 2 --template EDSR+CSD --teacher EDSR \
    --save_results --chop --patch_size 96 "$@"
