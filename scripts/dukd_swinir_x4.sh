#!/usr/bin/env bash
# DUKD (Zhang et al., 2023), scale 4: distils SwinIR into a SwinIR of 4 groups with 60 channels.
# Arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir dukd/swinir_x4 --scale 4 --template SwinIR_student+DUKD_SwinIR --teacher SwinIR \
    --save_results --chop --patch_size 192 "$@"
