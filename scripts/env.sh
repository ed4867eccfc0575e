# Sourced by the other scripts: creates the virtual environment .venv and installs requirements.txt (or the file named by
# REQUIREMENTS) in it, unless that is done already, puts its python first in PATH, and sets `root` and `code`, the folders of
# the repository and of its code. The current folder remains that of the user, as do relative paths in arguments.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
code=$root/code
venv=$root/.venv

requirements=${REQUIREMENTS:-requirements.txt}
installed=$venv/installed-$requirements
if ! { cat "$root"/requirements*.txt | cmp -s - "$installed" && "$venv/bin/python" -c "" 2>/dev/null; }; then
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        echo "error: needs Python 3.10 to 3.13 as python3, or named by PYTHON=/path/to/python3.12" >&2
        exit 2
    fi
    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        rm -rf "$venv"
        if ! "$python" -m venv "$venv"; then
            echo "error: $python cannot make .venv; on Debian and Ubuntu: apt install python3-venv" >&2
            exit 2
        fi
    fi
    echo "installing $requirements into .venv (once; PyTorch is large)"
    if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$root/$requirements"; then
        echo "error: pip could not install $requirements, see above" >&2
        exit 2
    fi
    cat "$root"/requirements*.txt | tee "$installed" > "$venv/installed-requirements.txt"
fi
PATH=$venv/bin:$PATH
