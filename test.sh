#!/usr/bin/env bash
# Runs the tests on the CPU, three at a time: some wait. bash test.sh -m 'not slow' leaves out the long ones.
source "$(dirname "$0")/scripts/env.sh"
echo "Style, then about 2,540 tests on the CPU: 15 minutes on two cores, far fewer with -m 'not slow'. One of them is DeepSpeed's, which compiles the first time."
ruff check .
ruff format --check .
lint-imports --no-logo --no-cache
exec python -m pytest -n "${PYTEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
