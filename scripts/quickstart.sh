#!/usr/bin/env bash
# A complete experiment in a few minutes, on photos that come with scikit-image: trains a small RCAN without a teacher, and
# with the teacher in teacher_checkpoint/ (FAKD), and compares both and the teacher on photos held out of training.
# Arguments go to train.py.
source "$(dirname "$0")/env.sh"

# Both students have the same size, number of iterations, seed, initial weights and order of crops.
common=(--scale 2 --model RCAN --n_resgroups 2 --n_resblocks 2 --n_feats 24 --reduction 6
    --data_train Sample --data_test Sample --patch_size 64 --batch_size 8 --epochs 3 --test_every 200
    --lr 1e-3 --decay cosine --n_threads 1 --seed 1 --reset "$@")

echo "== student from scratch"
python "$code/train.py" "${common[@]}" --alpha 0 --feature_loss_used 0 --ckp_dir quickstart/scratch
echo "== student distilled from the teacher (FAKD)"
python "$code/train.py" "${common[@]}" --teacher RCAN --alpha 0.5 --feature_distilation_type 10*SA --features [1,2,3] \
    --ckp_dir quickstart/distilled

experiments=$root/experiment/quickstart
echo "== held-out photos"
python "$code/compare.py" --scale 2 --data_test Sample --ckp_dir quickstart --ckp_path \
    "scratch=$experiments/scratch/model/model_latest.pt+distilled=$experiments/distilled/model/model_latest.pt+teacher=RCAN"
