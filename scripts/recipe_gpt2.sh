#!/usr/bin/env bash
# GPT-2: two reward models, PPO, DPO and online DPO (docs/recipes/gpt2.md), offline, on a small stand-in for GPT-2.
#   bash scripts/recipe_gpt2.sh [OUTPUT]       (default: runs/recipes/gpt2); run it again to resume
#
# MODEL=...      the real model instead: a folder or hub id (openai-community/gpt2)
# TOKENIZER=...  a tokenizer for the stand-in: a folder or hub id
# DATA=...       a file of preference pairs (prompt, accepted, rejected) instead of the five pairs
# QUICK=1        a few steps of each stage
set -euo pipefail
pairs=$([ -z "${DATA:-}" ] || realpath "$DATA")
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare plots
scripts=$PWD/scripts output=${1:-runs/recipes/gpt2}
mkdir -p "$output"
cd "$output"

# Questions for advice. A quarter of them is held out: they are in held_out.jsonl, unseen.jsonl and *_test.jsonl only.
make() { python "$scripts/recipe_data.py" "$@"; }
make five_pairs data/pairs.jsonl
make ultrafeedback data/ultrafeedback.jsonl --rows 800
make ultrafeedback data/ultrafeedback_test.jsonl --rows 72 --held-out
make prompts data/prompts.jsonl --rows 216
make prompts data/held_out.jsonl --rows 72 --held-out
make examples data/unseen.jsonl --rows 6 --held-out
pairs=${pairs:-data/pairs.jsonl}

# A GPT-2 of two narrow layers, half of whose answers are good. Small models need larger steps.
model=(--model.path model --model.revision null)
if [ -n "${MODEL:-}" ]; then
  model=(--model.path "$MODEL" --model.revision null)
elif [ ! -d model ]; then
  make text data/text.jsonl --rows 2000
  python "$scripts/stand_in.py" gpt2 model --text data/text.jsonl --steps "$(quick 400 4)" \
    ${TOKENIZER:+--tokenizer "$TOKENIZER"}
fi

# The pairs as the trainers read them, and the tokens of the first with their ids.
jaxrlhf data "$pairs" --model "${model[1]}" --data.completion_prefix " " --ids

# Reward model A, with two labels, from five pairs; then its verdicts on pairs that it has not seen.
jaxrlhf reward recipes/gpt2/reward "${model[@]}" --data.path "$pairs" --optim.learning_rate 1e-3 \
  --train.num_train_epochs "$(quick 30 2)"
jaxrlhf evaluate runs/gpt2/reward --examples data/unseen.jsonl

# Reward model B, pairwise with LoRA in UltraFeedback's layout, evaluated every 50 steps; then the curve of its accuracy.
jaxrlhf reward recipes/gpt2/pairwise "${model[@]}" --data.path data/ultrafeedback.jsonl \
  --data.validation_path data/ultrafeedback_test.jsonl --data.validation_split "" --data.max_length 64 \
  --optim.learning_rate 1e-3 --train.max_steps "$(quick 200 4)" --train.num_train_epochs 4
jaxrlhf plot runs/gpt2/pairwise

# PPO with reward model A, one completion per update; then the trend of its reward, and all samples as CSV.
jaxrlhf ppo recipes/gpt2/ppo "${model[@]}" --data.path data/prompts.jsonl --optim.learning_rate 5e-5 \
  --ppo.total_episodes "$(quick 300 4)" --logging.log_every 20
jaxrlhf plot runs/gpt2/ppo

# DPO on the pairs, and online DPO of each generated answer against one fixed poor answer.
jaxrlhf dpo recipes/gpt2/dpo "${model[@]}" --data.path "$pairs" --optim.learning_rate 5e-5 \
  --train.num_train_epochs "$(quick 5 1)"
jaxrlhf grpo recipes/gpt2/online_dpo "${model[@]}" --data.path data/prompts.jsonl --optim.learning_rate 2e-5 \
  --grpo.total_episodes "$(quick 200 4)" --logging.log_every 20

# The three beside the untrained model on five prompts with reference answers: BLEU, as a table and as a plot.
models=("${MODEL:-model}" runs/gpt2/ppo runs/gpt2/dpo runs/gpt2/online_dpo)
jaxrlhf compare "${models[@]}" --prompts data/held_out.jsonl --references answer --num-prompts 5 --greedy \
  --max-new-tokens 20 --show 5 --output bleu
# The same on all held-out prompts, by two functions that know the right answers and that nothing was trained on.
jaxrlhf compare "${models[@]}" --prompts data/held_out.jsonl --num-prompts "$(quick 72 4)" --num-completions 2 \
  --max-new-tokens 20 --show 0 --output comparison \
  --reward.components.0.function "$scripts/recipe_data.py:polite" \
  --reward.components.1.function "$scripts/recipe_data.py:right_tip"
