#!/usr/bin/env bash
# MCADKD (Ko et al., ICCVW 2025), scale 3: distils SwinIR into a SwinIR of 4 groups with 60 channels.
# Arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir mcadkd/swinir_x3 --scale 3 --template SwinIR_student+MCADKD --teacher SwinIR \
    --save_results --chop --patch_size 144 "$@"
