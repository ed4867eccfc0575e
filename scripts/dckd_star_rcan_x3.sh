#!/usr/bin/env bash
# DCKD* (Zhou et al., AAAI 2025), scale 3: distils RCAN into an RCAN of 10 groups with 6 blocks each.
# DCKD* is DCKD with the zoom-in of DUKD, for which only TS is computed. Arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir dckd_star/rcan_x3 --scale 3 --template RCAN_student+DCKD --teacher RCAN \
    --upcycle zoom_in --view_terms TS --save_results --chop --patch_size 144 "$@"
