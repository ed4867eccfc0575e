#!/usr/bin/env bash
# FAKD (He et al., ICIP 2020), scale 3: distils SAN into a small SAN by spatial affinity.
# Arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir overall_distilation/san/SA_x3 --scale 3 --teacher [SAN] --model SAN \
    --alpha 0.5 --feature_loss_used 1 --feature_distilation_type 10*SA --features [1,2,3] \
    --epochs 200 --save_results --chop --patch_size 144 "$@"
