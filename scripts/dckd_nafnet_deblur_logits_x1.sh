#!/usr/bin/env bash
# DCKD/NAFNet/deblur/logits as published, DCKD (AAAI 2025, arXiv 2412.08939); arguments go to train.py.
source "$(dirname "$0")/env.sh"
python "$code/train.py" --published DCKD/NAFNet/deblur/logits "$@"
