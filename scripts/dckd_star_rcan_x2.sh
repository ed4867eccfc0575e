#!/usr/bin/env bash
# DCKD*, DCKD with DUKD's zoom-in: RCAN's student, 10 groups of 6 blocks, x2 (Zhou et al., AAAI 2025).
# On zoom-in the student learns from the teacher's output alone, as in DUKD; arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir dckd_star/rcan_x2 --scale 2 --template RCAN_student+DCKD --teacher RCAN \
    --upcycle zoom_in --view_terms TS --save_results --chop --patch_size 96 "$@"
