#!/usr/bin/env bash
# Run the tests. Arguments go to pytest: bash scripts/test.sh tests/models -k causal
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare dev
# The tests of a file run in one process and share the programs that they compile.
exec python -m pytest -n "${JAXRLHF_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
