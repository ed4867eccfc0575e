#!/usr/bin/env bash
# Downloads a file with curl, or with wget if there is no curl: bash scripts/fetch.sh URL FILE VARIABLE
# Continues the download if FILE exists; the caller names it *.part, and renames it after checking its content.
# VARIABLE is the name of the environment variable that can contain another address, for error messages.
set -euo pipefail
export LC_ALL=C
url=$1 file=$2 variable=$3

fail() {
    echo "error: $1" >&2
    exit 2
}

request() { # prints the reason of a failure
    if command -v curl >/dev/null; then
        # no --retry: it would discard what the failed attempt has received
        curl "$([ -t 2 ] && echo --progress-bar || echo --silent)" --fail --location --globoff --connect-timeout 30 \
            --proto =http,https --proto-redir =http,https --speed-limit 1 --speed-time 60 --continue-at - \
            --write-out '%{errormsg}' --output "$file" --url "$url"
    else
        wget --no-verbose --output-file=/dev/stdout --tries=1 --timeout=60 --continue --output-document="$file" "$url"
    fi
}

[[ $url =~ ^https?://[^[:space:]]+$ ]] || fail "$variable: '$url' is not an address such as https://host/file"
command -v curl >/dev/null || command -v wget >/dev/null || fail "curl is missing; install it (apt install curl) or wget"
failures=0 largest=0
until reason=$(request); do
    status=$? message="$url: ${reason##*$'\n'}; run again to continue, or name another address by $variable"
    case $status:$reason in
        *error:\ 416*) exit 0 ;; # the file is complete
        33:*) rm -f "$file" ;; # the server cannot continue a file: start anew
        23:* | 3:*annot\ write* | 3:*denied*) fail "$file: cannot write; make space there, or give another folder" ;;
        *error:\ 4* | *ERROR\ 4*) fail "$message" ;; # no such file: another attempt would fail too
    esac
    size=$(wc -c 2>/dev/null < "$file" || echo 0)
    [ "$size" -le "$largest" ] || largest=$size failures=0
    failures=$((failures + 1))
    [ "$failures" -lt 4 ] || fail "$message"
    sleep "$failures"
done
