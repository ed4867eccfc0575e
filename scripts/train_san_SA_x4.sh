#!/usr/bin/env bash
# FAKD's SAN student for x4, taught by SAN with spatial affinity; arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir overall_distilation/san/SA_x4 --scale 4 --teacher [SAN] --model SAN \
    --alpha 0.5 --feature_loss_used 1 --feature_distilation_type 10*SA --features [1,2,3] \
    --epochs 200 --save_results --chop --patch_size 192 "$@"
