#!/usr/bin/env bash
# FAKD (He et al., ICIP 2020), scale 4: trains the EDSR student without distillation, as the baseline.
# Arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --ckp_dir student_baseline/edsr_baseline/baseline_x4 --scale 4 --model EDSR \
    --alpha 0 --feature_loss_used 0 \
    --epochs 200 --save_results --chop --patch_size 192 "$@"
