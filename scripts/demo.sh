#!/usr/bin/env bash
# Run the whole pipeline on a laptop CPU, offline once installed: SFT, reward model, PPO, evaluation.
#   bash scripts/demo.sh [--seed N] [--output DIR]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare plots
jaxrlhf demo "$@"
[ -n "${VIRTUAL_ENV:-}" ] || echo "to run jaxrlhf's commands: source ${JAXRLHF_VENV:-.venv}/bin/activate"
