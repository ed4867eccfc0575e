#!/usr/bin/env bash
# Compares distillation methods: trains one student by each method, once per seed, with the same learning rate and moving
# average, and with the same number of iterations or for the same time.
#
#     bash scripts/compare_methods.sh --scale 2 --template Compact_S --teacher RCAN --epochs 5 --test_every 1000
#     METHODS="scratch FAKD" SEEDS="1 2 3" MINUTES=5 bash scripts/compare_methods.sh --scale 2 ...
#
# METHODS, SEEDS   environment variables: the methods and seeds to compare (default: all methods, seeds 1 2 3)
# NAME             folder of the runs in experiment/ (default: compare_methods)
# MUON_LR          learning rate of the methods that are trained by MUON (default: --lr, as of the others)
# MINUTES          trains each student for about this time instead of --epochs and --test_every: the time of an iteration is
#                  measured once for each method, so nothing else should run on the machine
# Arguments go to train.py: student, one teacher, data. Finished runs are not repeated, interrupted runs continue. The runs,
# methods.csv (the scores of each run), methods.md (the table), methods_gap.png and methods_time.png are in
# experiment/compare_methods, or with MINUTES=5 in experiment/compare_methods_5min.
#
# CSD stands for its contrastive loss, with a student that is no slice of the teacher. Where the released weights of VGG-19 or
# the VQGAN are not in teacher_checkpoint/, the feature networks are random, and the table says so.
source "$(dirname "$0")/env.sh"
minutes=${MINUTES:-}
name=${NAME:-compare_methods}${minutes:+_${minutes}min}
experiments=$root/experiment/$name
all="scratch scratch_MUON TS TS_cached FAKD CSD DUKD DCKD MCADKD best"
methods=${METHODS:-$all}
seeds=${SEEDS:-1 2 3}
epochs=5 # tests during the training, with MINUTES

is_random() { # whether the file of a method's feature network is missing
    case $1 in
        CSD) [ ! -e "$root/teacher_checkpoint/vgg19-dcbb9e9d.pth" ] ;;
        DCKD) [ ! -e "$root/teacher_checkpoint/vqgan_f16_1024.ckpt" ] ;;
        *) false ;;
    esac
}

flags_of() {
    case $1 in
        scratch) echo "--loss 1*DS" ;;
        scratch_MUON) echo "--loss 1*DS --optimizer MUON" ;;
        inherit) echo "--template inherit" ;;
        TS) echo "--loss 1*DS+1*TS" ;;
        TS_cached) echo "--loss 1*DS+1*TS --cache_teacher" ;;
        CSD) echo "--loss 1*DS+200*CSD" ;;
        FAKD | DUKD | DCKD | MCADKD | best | best_running) echo "--template $1" ;;
        *) echo "error: METHODS: unknown method $1; the methods are $all best_running inherit" >&2; return 2 ;;
    esac
}

flags=() # those of the user, without --template, which is joined to the preset of a method
teacher=RCAN
template=
while [ $# -gt 0 ]; do
    case $1 in
        --template) template=${2-} && shift ;;
        --template=*) template=${1#--template=} ;;
        --teacher) teacher=${2-} && flags+=(--teacher "$teacher") && shift ;;
        --teacher=*) teacher=${1#--teacher=} && flags+=("$1") ;;
        *) flags+=("$1") ;;
    esac
    shift
done

train() { # method, folder, flags
    local method=$1 folder=$2 of_method
    shift 2
    of_method=$(flags_of "$method")
    case $of_method in
        "--template "*) of_method="$of_method${template:++$template}" ;;
        *) of_method="$of_method${template:+ --template $template}" ;;
    esac
    if is_random "$method"; then of_method="$of_method --feature_net random"; fi
    case $method in scratch_MUON | best | best_running) set -- ${MUON_LR:+--lr "$MUON_LR"} "$@" ;; esac
    python "$code/train.py" $of_method --lr 2e-4 --betas 0.9,0.99 --decay cosine --ema 0.999 "${flags[@]}" "$@" \
        --resume auto --ckp_dir "$name/$folder"
}

set -f # no expansion of file names: 1*DS is a loss
for method in $methods; do flags_of "$method" >/dev/null; done
if [ -n "$minutes" ]; then
    for method in $methods; do
        echo "== $method, time of an iteration"
        train "$method" "rate/$method" --warmup 0 --seed 1 --epochs 4 --test_every 20
    done
fi
for seed in $seeds; do
    for method in $methods; do
        echo "== $method, seed $seed"
        length=()
        if [ -n "$minutes" ]; then
            iterations=$(python "$code/seed_statistics.py" "$experiments/rate/$method" --iterations_in "$minutes")
            length=(--epochs "$epochs" --test_every $((iterations / epochs + 1)))
        fi
        train "$method" "${method}_$seed" "${length[@]}" --seed "$seed"
    done
done

echo "== the teacher and bicubic upscaling"
python "$code/compare.py" "${flags[@]}" --ckp_path "teacher=$teacher" --ckp_dir "$name"

echo "== PSNR and SSIM of the last epoch, mean ± standard deviation over seeds"
random=
for method in $methods; do
    if is_random "$method"; then random="$random $method"; fi
done
python "$code/seed_statistics.py" "$experiments" --methods $methods --seeds $seeds --random_features $random
