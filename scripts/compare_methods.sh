#!/usr/bin/env bash
# One student by several methods at equal iterations, rate and averaging, once per seed, and a table of their last PSNR:
# mean and largest distance from it over the seeds. Arguments go to train.py and say which student, teacher and data, such as
#     bash scripts/compare_methods.sh --scale 2 --model RCAN --n_feats 16 --teacher RCAN --epochs 20
# METHODS and SEEDS choose among them; runs that are done are not done again, one that was interrupted goes on.
source "$(dirname "$0")/env.sh"
experiments=$root/experiment/compare_methods
methods=${METHODS:-scratch inherit TS TS_cached FAKD DUKD DUKD_inherit}
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
        *) echo "error: METHODS: there is no $1" >&2; return 2 ;;
    esac
}

set -f  # 1*DS is no pattern of file names
for method in $methods; do flags_of "$method" >/dev/null; done
for seed in $seeds; do
    for method in $methods; do
        resume=0
        if [ -e "$experiments/${method}_$seed/state.pt" ]; then resume=1; fi
        echo "== $method, seed $seed"
        python "$code/train.py" $(flags_of "$method") --lr 2e-4 --betas 0.9,0.99 --decay cosine --ema 0.999 "$@" \
            --seed "$seed" --resume $resume --ckp_dir "compare_methods/${method}_$seed"
    done
done

echo "== PSNR of the last epoch: mean +- largest distance, runs"
for method in $methods; do
    for seed in $seeds; do
        file=$experiments/${method}_$seed/metrics.csv
        if [ -e "$file" ]; then awk -F, 'NR > 1 { last[$3] = $5 } END { for (name in last) print name, last[name] }' "$file"; fi
    done | sort | awk -v method="$method" '
        function show(mean, far) {
            mean = n ? sum / n : 0
            far = (high - mean > mean - low) ? high - mean : mean - low
            if (n) printf("%-14s %-10s %.3f +- %.3f  %d\n", method, name, mean, far, n)
        }
        $1 != name { show(); name = $1; n = sum = 0; low = 1e9; high = -1e9 }
        { n++; sum += $2; if ($2 < low) low = $2; if ($2 > high) high = $2 }
        END { show() }'
done
