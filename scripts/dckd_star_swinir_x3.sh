#!/usr/bin/env bash
# DCKD* (Zhou et al., AAAI 2025), scale 3: distils SwinIR into a SwinIR of 4 groups with 60 channels.
# DCKD* is DCKD with the zoom-in of DUKD, for which only TS is computed. Arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir dckd_star/swinir_x3 --scale 3 --template SwinIR_student+DCKD --teacher SwinIR \
    --upcycle zoom_in --view_terms TS --save_results --chop --patch_size 144 "$@"
