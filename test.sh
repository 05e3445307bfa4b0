#!/usr/bin/env bash
# Runs the tests on the CPU, two at a time. bash test.sh -m 'not slow' leaves out the long ones.
source "$(dirname "$0")/scripts/env.sh"
ruff check .
ruff format --check .
exec python -m pytest -n "${PYTEST_WORKERS:-2}" "$@"
