#!/usr/bin/env bash
# DCKD*, DCKD with DUKD's zoom-in: SwinIR's student, 4 groups of 60 channels, x3 (Zhou et al., AAAI 2025).
# On zoom-in the student learns from the teacher's output alone, as in DUKD; arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir dckd_star/swinir_x3 --scale 3 --template SwinIR_student+DCKD --teacher SwinIR \
    --upcycle zoom_in --view_terms TS --save_results --chop --patch_size 144 "$@"
