#!/usr/bin/env bash
# MCADKD: SwinIR's student, 4 groups of 60 channels, x2 (Ko et al., ICCVW 2025); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir mcadkd/swinir_x2 --scale 2 --template SwinIR_student+MCADKD --teacher SwinIR \
    --save_results --chop --patch_size 96 "$@"
