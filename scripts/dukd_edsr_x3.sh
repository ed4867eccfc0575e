#!/usr/bin/env bash
# DUKD (Zhang et al., 2023), scale 3: distils EDSR into an EDSR of 32 blocks with 64 channels.
# Arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir dukd/edsr_x3 --scale 3 --template EDSR_DUKD+DUKD --teacher EDSR \
    --save_results --chop --patch_size 144 "$@"
