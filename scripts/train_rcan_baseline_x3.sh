#!/usr/bin/env bash
# FAKD (He et al., ICIP 2020), scale 3: trains the RCAN student without distillation, as the baseline.
# Arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir student_baseline/rcan_baseline/baseline_x3 --scale 3 --model RCAN \
    --alpha 0 --feature_loss_used 0 \
    --epochs 200 --save_results --chop --patch_size 144 "$@"
