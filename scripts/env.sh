# Sourced by the other scripts: makes .venv with what FILE lists (requirements.txt unless REQUIREMENTS says otherwise),
# or reuses it where that is installed already, and goes to code/ with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

requirements=${REQUIREMENTS:-requirements.txt}
installed=.venv/installed-$requirements
if ! { cat requirements*.txt | cmp -s - "$installed" && .venv/bin/python -c "" 2>/dev/null; }; then
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
        echo "error: needs Python 3.10 to 3.13 as python3, or named by PYTHON=/path/to/python3.12" >&2
        exit 2
    fi
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        rm -rf .venv
        if ! "$python" -m venv .venv; then
            echo "error: $python cannot make .venv; on Debian and Ubuntu: apt install python3-venv" >&2
            exit 2
        fi
    fi
    echo "installing $requirements into .venv (once; PyTorch is large)"
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"; then
        echo "error: pip could not install $requirements, see above" >&2
        exit 2
    fi
    cat requirements*.txt | tee "$installed" > .venv/installed-requirements.txt
fi
PATH=$PWD/.venv/bin:$PATH
cd code
