#!/usr/bin/env bash
# DUKD: SwinIR's student, 4 groups of 60 channels, x3 (Zhang et al., 2023); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir dukd/swinir_x3 --scale 3 --template SwinIR_student+DUKD_SwinIR --teacher SwinIR \
    --save_results --chop --patch_size 144 "$@"
