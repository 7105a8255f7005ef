#!/usr/bin/env bash
# The stages of the teaching notebook (docs/recipes/notebook.md) by command line, offline, on a small stand-in for GPT-2.
#   bash scripts/recipe_notebook.sh [OUTPUT]       (default: runs/recipes/notebook-commands); run it again to resume
#
# MODEL=...      the real model instead: a folder or hub id (openai-community/gpt2)
# TOKENIZER=...  a tokenizer for the stand-in: a folder or hub id
# DATA=...       a file of preference pairs (prompt, chosen, rejected) for the reward model
# QUICK=1        a few steps of each stage
set -euo pipefail
pairs=$([ -z "${DATA:-}" ] || realpath "$DATA")
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare plots
scripts=$PWD/scripts output=${1:-runs/recipes/notebook-commands}
mkdir -p "$output"
cd "$output"

# Answers in any tone, pairs of a good and a bad answer, prompts. A quarter of the questions is in held_out.jsonl and
# named.jsonl only.
make() { python "$scripts/recipe_data.py" "$@"; }
make every_tone data/answers.jsonl --rows 2400
make pairs data/pairs.jsonl --rows 800
make pairs data/held_out.jsonl --rows 144 --held-out
make prompts data/prompts.jsonl --rows 216
make examples data/named.jsonl --rows 6 --held-out
pairs=${pairs:-data/pairs.jsonl}

# A GPT-2 of two narrow layers with random weights: the first stage trains it. Small models need larger steps.
model=(--model.path model --model.revision null)
if [ -n "${MODEL:-}" ]; then
  model=(--model.path "$MODEL" --model.revision null)
elif [ ! -d model ]; then
  python "$scripts/stand_in.py" gpt2 model --text data/answers.jsonl ${TOKENIZER:+--tokenizer "$TOKENIZER"}
fi

# Supervised fine-tuning.
jaxrlhf sft recipes/notebook/sft "${model[@]}" --data.path data/answers.jsonl --optim.learning_rate 3e-3 \
  --train.max_steps "$(quick 600 4)" --train.num_train_epochs 4

# The reward model, its curves of loss and accuracy, and its verdicts on named examples.
jaxrlhf reward recipes/notebook/reward --data.path "$pairs" --data.validation_path data/held_out.jsonl \
  --optim.learning_rate 1e-3 --train.max_steps "$(quick 250 4)"
jaxrlhf plot runs/notebook/reward
jaxrlhf evaluate runs/notebook/reward --examples data/named.jsonl --data.template "Prompt: {prompt}\nResponse:"

# PPO, and its curves.
jaxrlhf ppo recipes/notebook/ppo --data.path data/prompts.jsonl --sampling.response_length 32 \
  --optim.learning_rate 1e-4 --ppo.total_episodes "$(quick 3200 64)"
jaxrlhf plot runs/notebook/ppo

# SFT against RLHF: three prompts with the reward of each answer, and all held-out prompts. Two functions that know the
# right answers, and that nothing was trained on, are measured beside the reward: their weight is 0.
jaxrlhf compare runs/notebook/sft runs/notebook/ppo --prompts data/held_out.jsonl --num-prompts "$(quick 72 4)" \
  --temperature 0.7 --top-p 0.9 --max-new-tokens 32 --show 3 --output comparison \
  --reward-model runs/notebook/reward \
  --reward.components.0.function "$scripts/recipe_data.py:polite" --reward.components.0.weight 0 \
  --reward.components.1.function "$scripts/recipe_data.py:right_tip" --reward.components.1.weight 0
