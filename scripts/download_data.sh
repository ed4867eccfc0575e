#!/usr/bin/env bash
# usage: bash scripts/download_data.sh [DIV2K] [benchmark] [GoPro] [Rain13K] [SIDD] [RealSR] [--dir_data DATA_ROOT] [--keep]
#
# Downloads DIV2K (7 GB) and the benchmarks Set5, Set14, B100 and Urban100 (default: both) into DATA_ROOT (default: dataset).
# To continue after an interruption, run it again; datasets that are complete are not downloaded again. If DATA_ROOT contains
# an archive named DIV2K or benchmark (.tar, .tar.gz, .tgz, .tar.bz2, .tar.xz or .zip), it is used instead, and kept.
#
# GoPro (deblurring), Rain13K (deraining), SIDD (denoising) and RealSR (real-world super-resolution) are linked from pages: the
# page, the folders in which train.py finds the images, and its flags are printed.
#
# --keep                     keep the downloaded archives
# DIV2K_URL, BENCHMARK_URL   environment variables: addresses of the archives, in place of the default ones
set -euo pipefail
shopt -s nullglob
export LC_ALL=C

fail() {
    echo "error: $*" >&2
    exit 2
}

count_images() {
    find "$1/" -maxdepth 1 -name '[!.]*.png' 2>/dev/null | wc -l | tr -d ' '
}

check() { # check FOLDER DATASET: prints what is incomplete; LR folders are optional, the data loader makes LR images itself
    local set sets=(DIV2K/DIV2K_train_) hr folder count
    [ "$2" = DIV2K ] || sets=(benchmark/{Set5,Set14,B100,Urban100}/)
    for set in "${sets[@]}"; do
        hr=$(count_images "$1/${set}HR") || hr=0
        [ "$hr" -gt 0 ] || { echo "no PNG images in ${set}HR"; return 1; }
        for folder in "$1/${set}LR_bicubic"/X*; do
            count=$(count_images "$folder")
            [ "$count" -eq "$hr" ] || { echo "${folder#"$1/"} holds $count PNG images, ${set}HR $hr"; return 1; }
        done
    done
}

describe() { # describe DATASET: the page that links to it, its folders in DATA_ROOT, and the flags of train.py
    case $1 in
        GoPro) echo "seungjunnah.github.io/Datasets/gopro (GOPRO_Large.zip), unpack it to GoPro/train and GoPro/test;" \
            "--scale 1 --pair_dirs blur/sharp --data_train GoPro --data_test GoPro" ;;
        Rain13K) echo "github.com/swz30/Restormer/tree/main/Deraining, unpack them to train/Rain13K and test/{Test100,Rain100H," \
            "Rain100L,Test2800,Test1200}; --scale 1 --pair_dirs input/target --data_train Rain13K --data_test Rain100L" ;;
        SIDD) echo "abdokamel.github.io/sidd (SIDD-Medium, sRGB), move its images *_NOISY_* to SIDD/input and *_GT_* to" \
            "SIDD/target; --scale 1 --pair_dirs input/target --data_train SIDD" ;;
        RealSR) echo "github.com/csjcai/RealSR (version 3), move its images *_LR4.png to RealSR/train/LR, *_HR.png of the same" \
            "folders to RealSR/train/HR, likewise for test; --scale 4 --pair_dirs LR/HR --data_train RealSR" ;;
    esac
}

unpack() { # unpack ARCHIVE FOLDER; Python's zipfile itself drops absolute paths and '..', and makes no links
    local members unsafe='^[^-d]| /|[ /]\.\.(/|$)' # links and devices; absolute paths; parent folders
    if [ "$(head -c 2 "$1" | tr -d '\0')" = PK ]; then
        "${PYTHON:-python3}" -m zipfile -e "$1" "$2" 2>&1 | tail -n 1 # of a traceback, the error
        return
    fi
    members=$(tar --numeric-owner -Ptvf "$1") || return 1
    ! grep -E "$unsafe" <<< "$members" | sed 's/^/a link, a device, or outside of the folder: /' || return 1
    tar -xf "$1" -C "$2" --no-same-owner --no-same-permissions
}

scripts=$(cd "$(dirname "$0")" && pwd)
root=${scripts%/*}/dataset keep='' names=() linked=() status=0
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set/s/^#\( \|$\)//p' "$0"; exit ;;
        --dir_data) [ $# -gt 1 ] || fail "--dir_data: no folder given"; root=$2; shift ;;
        --dir_data=*) root=${1#*=} ;;
        --keep) keep=1 ;;
        DIV2K | benchmark) names+=("$1") ;;
        GoPro | Rain13K | SIDD | RealSR) linked+=("$1") ;;
        *) fail "there is no dataset or flag $1: there are DIV2K, benchmark, GoPro, Rain13K, SIDD, RealSR, and the flags" \
            "--dir_data DATA_ROOT and --keep" ;;
    esac
    shift
done
[ $((${#names[@]} + ${#linked[@]})) -gt 0 ] || names=(DIV2K benchmark)
for name in ${linked[@]+"${linked[@]}"}; do
    echo "error: $name: cannot be downloaded directly; follow the links on $(describe "$name")" >&2
    status=2
done
[ ${#names[@]} -gt 0 ] || exit $status
root=${root/#"~/"/$HOME/} # quoted, or after --dir_data=
[[ $root == /* ]] || root=$PWD/$root
mkdir -p "$root" 2>/dev/null || fail "$root: cannot make this folder"

for name in ${names[@]+"${names[@]}"}; do
    staging=$root/.$name.unpacking # it exists while images are being put in place, and after that was interrupted
    if [ ! -d "$staging" ]; then
        problem=$(check "$root" "$name") && echo "$name: complete in $root/$name" && continue
        [[ $problem == "no "* ]] || fail "$root/$problem; move that folder away, then run again"
    fi
    part=
    for archive in "$root/$name".{zip,tgz,tar.xz,tar.bz2,tar.gz,tar}; do [ ! -f "$archive" ] || break; done
    if [ ! -f "$archive" ]; then
        variable=$(tr '[:lower:]' '[:upper:]' <<< "$name")_URL
        url=${!variable:-https://cv.snu.ac.kr/research/EDSR/$name.tar}
        echo "$name: downloading $url"
        archive=$archive.part part=$archive
        bash "$scripts/fetch.sh" "$url" "$part" "$variable"
    fi
    echo "$name: unpacking $archive"
    rm -rf "$staging"
    mkdir "$staging" 2>/dev/null || fail "$root: cannot write"
    problem=$(unpack "$archive" "$staging" 2>&1 && check "$staging" "$name") || {
        rm -rf "$staging"
        fail "$archive: not unpacked (${problem%%$'\n'*}); make space, or delete it to download it again"
    }
    mkdir -p "$root/$name" 2>/dev/null || fail "$root/$name: cannot make this folder"
    for folder in "$staging/$name"/*; do
        [ -e "$root/$name/${folder##*/}" ] || mv "$folder" "$root/$name/" 2>/dev/null || fail "$root/$name: cannot write"
    done
    rm -rf "$staging"
    problem=$(check "$root" "$name") || fail "$root/$problem; move that folder away, then run again"
    if [ -n "$part" ]; then
        if [ -n "$keep" ]; then mv "$part" "${part%.part}"; else rm "$part"; fi
    fi
    echo "$name: complete in $root/$name"
done
exit $status
