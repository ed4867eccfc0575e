#!/usr/bin/env bash
# Runs the tests and ruff; arguments go to pytest. Real images and weights are used where SR_SHARED names their folder.
REQUIREMENTS=requirements-test.txt
source "$(dirname "$0")/env.sh"
cd "$root"
ruff check .
python -m pytest "$@"
