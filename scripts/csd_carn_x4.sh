#!/usr/bin/env bash
# CSD: a quarter of CARN's channels learns beside the whole, x4 (Wang et al., IJCAI 2021); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir csd/carn_x4 --scale 4 --template CARN+CSD --teacher CARN \
    --save_results --chop --patch_size 192 "$@"
