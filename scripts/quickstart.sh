#!/usr/bin/env bash
# A complete experiment in a few minutes, on photos that come with scikit-image: trains a fast network (Compact) without a
# teacher, by ADAM and by MUON, and with the teacher in teacher_checkpoint/ by the preset `best`, and compares the three and the
# teacher on photos held out of training. Arguments go to train.py.
source "$(dirname "$0")/env.sh"

# All students have the same size, number of iterations, seed, initial weights and order of crops; each optimiser has the
# learning rate that is the better one for it.
common=(--scale 2 --data_train Sample --data_test Sample --patch_size 64 --batch_size 16 --epochs 1 --test_every 1500
    --n_threads 1 --seed 1 --reset "$@")

echo "== student from scratch, ADAM"
python "$code/train.py" --template best_running+Compact_S --loss "1*DS" --optimizer ADAM --lr 3e-3 "${common[@]}" \
    --ckp_dir quickstart/scratch
echo "== student from scratch, MUON"
python "$code/train.py" --template best_running+Compact_S --loss "1*DS" "${common[@]}" --ckp_dir quickstart/scratch_MUON
echo "== student distilled from the teacher"
python "$code/train.py" --template best+Compact_S --teacher RCAN "${common[@]}" --ckp_dir quickstart/distilled

experiments=$root/experiment/quickstart
students=
for student in scratch scratch_MUON distilled; do
    students+="$student=$experiments/$student/model/model_latest.pt+"
done
echo "== held-out photos"
python "$code/compare.py" --scale 2 --data_test Sample --ckp_dir quickstart --ckp_path "${students}teacher=RCAN" --html
