#!/usr/bin/env bash
# DUKD (Zhang et al., 2023), scale 4: distils RCAN into an RCAN of 10 groups with 6 blocks each.
# Arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir dukd/rcan_x4 --scale 4 --template RCAN_student+DUKD_RCAN --teacher RCAN \
    --save_results --chop --patch_size 192 "$@"
