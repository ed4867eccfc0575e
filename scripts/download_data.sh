#!/usr/bin/env bash
# usage: bash scripts/download_data.sh [DIV2K] [benchmark] [--dir_data DATA_ROOT] [--keep]
#
# Downloads DIV2K (7 GB) and the benchmarks Set5, Set14, B100 and Urban100 (default: both) into DATA_ROOT (default: dataset).
# To continue after an interruption, run it again; datasets that are complete are not downloaded again. If DATA_ROOT contains
# an archive named DIV2K or benchmark (.tar, .tar.gz, .tgz, .tar.bz2, .tar.xz or .zip), it is used instead, and kept.
#
# --keep                     keep the downloaded archives
# DIV2K_URL, BENCHMARK_URL   environment variables: addresses of the archives, in place of the default ones
set -euo pipefail
shopt -s nullglob
export LC_ALL=C

fail() {
    echo "error: $1" >&2
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
root=${scripts%/*}/dataset keep='' names=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) sed -n '2,/^set/s/^#\( \|$\)//p' "$0"; exit ;;
        --dir_data) [ $# -gt 1 ] || fail "--dir_data: no folder given"; root=$2; shift ;;
        --dir_data=*) root=${1#*=} ;;
        --keep) keep=1 ;;
        DIV2K | benchmark) names+=("$1") ;;
        *) fail "there is no dataset or flag $1: there are DIV2K, benchmark, --dir_data DATA_ROOT, --keep" ;;
    esac
    shift
done
[ ${#names[@]} -gt 0 ] || names=(DIV2K benchmark)
root=${root/#"~/"/$HOME/} # quoted, or after --dir_data=
[[ $root == /* ]] || root=$PWD/$root
mkdir -p "$root" 2>/dev/null || fail "$root: cannot make this folder"

for name in "${names[@]}"; do
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
