#!/usr/bin/env bash
# Modular PPO: LoRA on Qwen3-0.6B-Base, a learning rate each for policy and critic, summaries of posts, and the ten steps
# of an update as values (docs/recipes/modular.md), offline, on a small stand-in for Qwen3.
#   bash scripts/recipe_modular.sh [OUTPUT]       (default: runs/recipes/modular); run it again to resume
#
# MODEL=...      the real model instead: a folder or hub id (Qwen/Qwen3-0.6B-Base)
# TOKENIZER=...  a tokenizer for the stand-in: a folder or hub id
# DATA=...       a folder with posts.jsonl, pairs.jsonl, prompts.jsonl and held_out.jsonl
# QUICK=1        a few steps of each stage
set -euo pipefail
data=$([ -z "${DATA:-}" ] || realpath "$DATA")
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare plots
scripts=$PWD/scripts output=${1:-runs/recipes/modular}
mkdir -p "$output"
cd "$output"

# Posts with summaries, of which 40 % say who did what; pairs of summaries; posts without summaries.
make() { python "$scripts/recipe_data_tldr.py" "$@"; }
if [ -z "$data" ]; then
  data=data
  make sft data/posts.jsonl --rows 6000
  make pairs data/pairs.jsonl --rows 4000
  make prompts data/prompts.jsonl --rows 1000
  make prompts data/held_out.jsonl --rows 192 --held-out
fi

# A Qwen3 of two narrow layers. Small models need larger steps.
model=() sft=() reward=() ppo=()
if [ -n "${MODEL:-}" ]; then
  model=(--model.path "$MODEL")
  if [ -n "${QUICK:-}" ]; then
    sft=(--train.max_steps 4) reward=(--train.max_steps 4) ppo=(--ppo.total_episodes 64)
  fi
else
  [ -d model ] || python "$scripts/stand_in.py" qwen3-0.6b-base model --text "$data/posts.jsonl" \
    --steps "$(quick 600 4)" ${TOKENIZER:+--tokenizer "$TOKENIZER"}
  model=(--model.path model)
  sft=(--optim.learning_rate 1e-3 --train.micro_batch_size 32 --train.max_steps "$(quick 50 4)")
  reward=(--optim.learning_rate 2e-3 --train.micro_batch_size 32 --train.max_steps "$(quick 120 4)")
  ppo=(--optim.learning_rate 3e-4 --critic.learning_rate 3e-3 --ppo.micro_batch_size null
    --ppo.total_episodes "$(quick 1600 64)")
fi

# Adapters that summarise, and the reward model.
jaxrlhf sft recipes/modular/sft "${model[@]}" --data.path "$data/posts.jsonl" "${sft[@]}"
jaxrlhf reward recipes/modular/reward --data.path "$data/pairs.jsonl" "${reward[@]}"

# PPO on a merged model that it writes.
jaxrlhf ppo recipes/modular/ppo --data.path "$data/prompts.jsonl" "${ppo[@]}"
jaxrlhf plot runs/modular/ppo

# One update from Python, and its ten steps as values.
python "$scripts/recipe_modular.py" runs/modular/merged runs/modular/reward "$data/prompts.jsonl" > ten_steps.txt
head -n 20 ten_steps.txt
tail -n 10 ten_steps.txt

# SFT and PPO on other posts: the reward model, then an exact check that nothing was trained on.
posts=(--prompts "$data/held_out.jsonl" --num-prompts "$(quick 192 8)" --num-completions 1 --rollout.slots 64)
jaxrlhf compare runs/modular/merged runs/modular/ppo "${posts[@]}" --output comparison
if [ "$data" = data ]; then
  jaxrlhf compare runs/modular/merged runs/modular/ppo "${posts[@]}" --show 0 \
    --reward "$scripts/recipe_data_tldr.py:faithful" --output faithful.json
fi

# The adapters in PEFT's layout, and one merged model.
[ -d adapters ] || jaxrlhf export runs/modular/ppo adapters
[ -d merged ] || jaxrlhf export runs/modular/ppo merged --merge-lora
