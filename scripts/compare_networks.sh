#!/usr/bin/env bash
# Compares networks: trains each from scratch by ADAM and by the preset `best`, with the same data and iterations, and compares
# them with their teacher: compare.csv (PSNR, parameters, milliseconds) and compare_speed.png. ADAM has the learning rate 3e-3, or
# 1e-3 for networks that diverge at 3e-3.
#
#     NETWORKS="Compact_S SPAN_student" bash scripts/compare_networks.sh --scale 2 --teacher RCAN --dir_data DATA_ROOT
#
# NETWORKS   environment variable: presets of networks, or RCAN_tiny or EDSR_tiny (default: the fast ones)
# Arguments go to train.py and compare.py. Finished runs are not repeated, interrupted runs continue; all is in
# experiment/compare_networks.
source "$(dirname "$0")/env.sh"
name=compare_networks
networks=${NETWORKS:-Compact_S Compact_M Compact_L SPAN_student RCAN_tiny EDSR_tiny}

teacher=RCAN
for argument; do
    [ "${previous:-}" != --teacher ] || teacher=$argument
    previous=$argument
done

train() { # label, preset, flags
    local label=$1 preset=$2
    shift 2
    case ${label%/*} in
        RCAN_tiny) set -- --model RCAN --n_resgroups 3 --n_resblocks 4 --n_feats 12 --reduction 12 "$@" ;;
        EDSR_tiny) set -- --model EDSR --n_resblocks 4 --n_feats 16 "$@" ;;
        *) preset="$preset+${label%/*}" ;;
    esac
    echo "== $label"
    python "$code/train.py" --template "$preset" "$@" --resume auto --ckp_dir "$name/$label"
}

students=
for network in $networks; do
    case $network in
        Compact_S | *_tiny) rate=3e-3 ;;
        *) rate=1e-3 ;;
    esac
    train "$network/scratch" best_running "$@" --loss "1*DS" --optimizer ADAM --lr "$rate"
    train "$network/best" best "$@"
    for method in scratch best; do
        students+="$network/$method=$root/experiment/$name/$network/$method/model/model_latest.pt+"
    done
done
echo "== comparison"
python "$code/compare.py" "$@" --ckp_path "${students}teacher=$teacher" --ckp_dir "$name"
