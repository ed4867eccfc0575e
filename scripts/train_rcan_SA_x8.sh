#!/usr/bin/env bash
# FAKD (He et al., ICIP 2020), scale 8: distils RCAN into a small RCAN by spatial affinity.
# Arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir overall_distilation/rcan/SA_x8 --scale 8 --teacher [RCAN] --model RCAN \
    --alpha 0.5 --feature_loss_used 1 --feature_distilation_type 10*SA --features [1,2,3] \
    --epochs 200 --save_results --chop --patch_size 384 "$@"
