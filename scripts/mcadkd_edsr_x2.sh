#!/usr/bin/env bash
# MCADKD (Ko et al., ICCVW 2025), scale 2: distils EDSR into the EDSR baseline.
# Arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir mcadkd/edsr_x2 --scale 2 --template EDSR_baseline+MCADKD --teacher EDSR \
    --save_results --chop --patch_size 96 "$@"
