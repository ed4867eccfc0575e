#!/usr/bin/env bash
# Kills real training, caching and testing runs at random moments, resumes them, and compares what they leave, bit by bit,
# with uninterrupted runs; likewise full disks, concurrent starts and lost output. Linux only; arguments: --help.
REQUIREMENTS=requirements-test.txt
source "$(dirname "$0")/env.sh"
exec python "$root/tests/fault_injection.py" "$@"
