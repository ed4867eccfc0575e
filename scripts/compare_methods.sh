#!/usr/bin/env bash
# Compares distillation methods: trains one student by each method, once per seed, with the same number of iterations,
# learning rate and moving average, and tabulates the PSNR and SSIM of the last epoch as mean ± standard deviation over seeds.
#
#     METHODS="scratch TS FAKD" SEEDS="1 2 3" bash scripts/compare_methods.sh --scale 2 --model RCAN --n_feats 16 --epochs 20
#
# METHODS, SEEDS   environment variables: the methods and seeds to compare (default: all methods, seeds 1 2 3)
# Arguments go to train.py: student, teacher, data. Finished runs are not repeated, interrupted runs continue. The runs,
# methods.csv (the scores of each run) and methods.md (the table) are in experiment/compare_methods.
source "$(dirname "$0")/env.sh"
experiments=$root/experiment/compare_methods
all="scratch inherit TS TS_cached FAKD DUKD DUKD_inherit"
methods=${METHODS:-$all}
seeds=${SEEDS:-1 2 3}

flags_of() {
    case $1 in
        scratch) echo "--loss 1*DS" ;;
        inherit) echo "--template inherit" ;;
        TS) echo "--loss 1*DS+1*TS" ;;
        TS_cached) echo "--loss 1*DS+1*TS --cache_teacher" ;;
        FAKD) echo "--template FAKD" ;;
        DUKD) echo "--template DUKD" ;;
        DUKD_inherit) echo "--template DUKD --init_from_teacher" ;;
        *) echo "error: METHODS: unknown method $1; the methods are $all" >&2; return 2 ;;
    esac
}

set -f # no expansion of file names: 1*DS is a loss
for method in $methods; do flags_of "$method" >/dev/null; done
for seed in $seeds; do
    for method in $methods; do
        echo "== $method, seed $seed"
        python "$code/train.py" $(flags_of "$method") --lr 2e-4 --betas 0.9,0.99 --decay cosine --ema 0.999 "$@" \
            --seed "$seed" --resume auto --ckp_dir "compare_methods/${method}_$seed"
    done
done

echo "== PSNR and SSIM of the last epoch, mean ± standard deviation over seeds"
python "$code/seed_statistics.py" "$experiments" --methods $methods --seeds $seeds
