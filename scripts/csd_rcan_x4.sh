#!/usr/bin/env bash
# CSD (Wang et al., IJCAI 2021), scale 4: trains RCAN together with the student, a quarter of its channels.
# Arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir csd/rcan_x4 --scale 4 --template RCAN+CSD --teacher RCAN \
    --save_results --chop --patch_size 192 "$@"
