#!/usr/bin/env bash
# The whole pipeline on a laptop CPU, without a network once installed: SFT, reward model, PPO, and what came of it.
#   bash scripts/demo.sh [--seed N] [--output DIR]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare plots
exec jaxrlhf demo "$@"
