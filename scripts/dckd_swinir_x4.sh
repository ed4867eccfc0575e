#!/usr/bin/env bash
# DCKD (Zhou et al., AAAI 2025), scale 4: distils SwinIR into a SwinIR of 4 groups with 60 channels.
# Arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir dckd/swinir_x4 --scale 4 --template SwinIR_student+DCKD --teacher SwinIR \
    --save_results --chop --patch_size 192 "$@"
