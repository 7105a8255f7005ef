#!/usr/bin/env bash
# Type the commands of README.md as they stand, in their order, in a new directory: each has to succeed.
#
#   bash tests/ux/first_five_minutes.sh [--with-demo]
#
# Left out: installing, this project's tests, and commands that are marked as needing a hub, a GPU or torch. The demo,
# which tests/demo runs in full, is replaced by trainings of a few steps unless --with-demo is given.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1
jaxrlhf() { python -m jaxrlhf "$@"; }

python "$here/commands.py" "$root/README.md" > commands
started=$SECONDS
while IFS= read -r line <&3; do
  before=$SECONDS
  if [[ $line == "bash scripts/demo.sh"* && ${1:-} != --with-demo ]]; then
    command="python $here/stand_ins.py demo"
  else
    command=${line/#bash scripts/bash $root\/scripts}
  fi
  if ! eval "$command" > output 2>&1 < /dev/null; then
    cat output
    echo "FAILED: $line"
    exit 1
  fi
  if [[ $line =~ ^jaxrlhf\ new\ .*\>\ *([^ ]+) ]]; then  # the next step of a user
    python "$here/stand_ins.py" fill "${BASH_REMATCH[1]}"
  fi
  printf '%4d s  %s\n' $((SECONDS - before)) "$line"
done 3< commands
echo "all $(wc -l < commands) commands of the README in $((SECONDS - started)) s"
