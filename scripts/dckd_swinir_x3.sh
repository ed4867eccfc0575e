#!/usr/bin/env bash
# DCKD: SwinIR's student, 4 groups of 60 channels, x3 (Zhou et al., AAAI 2025); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir dckd/swinir_x3 --scale 3 --template SwinIR_student+DCKD --teacher SwinIR \
    --save_results --chop --patch_size 144 "$@"
