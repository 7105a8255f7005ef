#!/usr/bin/env bash
# SmolLM2-135M on Orca pairs: reward model, PPO with and without LoRA, GRPO (docs/recipes/smollm2.md), offline, on a
# small stand-in for SmolLM2.
#   bash scripts/recipe_smollm2.sh [OUTPUT]       (default: runs/recipes/smollm2); run it again to resume
#
# MODEL=...      the real model instead: a folder or hub id (HuggingFaceTB/SmolLM2-135M)
# TOKENIZER=...  a tokenizer for the stand-in: a folder or hub id
# DATA=...       a file of pairs (system, question, chosen, rejected) to train on
# QUICK=1        a few steps of each stage
set -euo pipefail
pairs=$([ -z "${DATA:-}" ] || realpath "$DATA")
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare plots
scripts=$PWD/scripts output=${1:-runs/recipes/smollm2}
mkdir -p "$output"
cd "$output"

# Pairs of answers to questions for advice, a quarter of which is held out; conversations of which half are good.
make() { python "$scripts/recipe_data.py" "$@"; }
make orca data/orca.jsonl --rows 800
make orca data/held_out.jsonl --rows 72 --held-out
make chats data/chats.jsonl --rows 2000
pairs=${pairs:-data/orca.jsonl}

# A SmolLM2 of two narrow layers. Small models need larger steps.
model=(--model.path model --model.revision null)
if [ -n "${MODEL:-}" ]; then
  model=(--model.path "$MODEL" --model.revision null)
elif [ ! -d model ]; then
  python "$scripts/stand_in.py" smollm2-135m model --text data/chats.jsonl --steps "$(quick 500 4)" \
    ${TOKENIZER:+--tokenizer "$TOKENIZER"}
fi

# The policy to start from, and the reward model.
jaxrlhf sft recipes/smollm2/sft "${model[@]}" --data.path data/chats.jsonl --data.max_length 128 \
  --optim.learning_rate 1e-3 --train.micro_batch_size 32 --train.max_steps "$(quick 30 4)"
jaxrlhf reward recipes/smollm2/reward "${model[@]}" --data.path "$pairs" --data.max_length 512 \
  --optim.learning_rate 2e-3 --train.micro_batch_size 32 --train.num_train_epochs 8 --train.max_steps "$(quick 100 4)" \
  --train.eval_every 25

# PPO on all weights and with --use-lora, and GRPO, with as many generated completions. The questions made above are
# short, as are good answers; with few padded lengths, few programs are compiled.
short=(--data.path "$pairs" --logging.log_every 5 --logging.sample_every 20)
[ -n "${DATA:-}" ] || short+=(--data.max_prompt_length 32 --sampling.response_length 24)
episodes=$(quick 640 32)
jaxrlhf ppo recipes/smollm2/ppo "${short[@]}" --optim.learning_rate 2e-4 \
  --ppo.num_train_epochs null --ppo.total_episodes "$episodes" --ppo.micro_batch_size 16
jaxrlhf ppo recipes/smollm2/ppo "${short[@]}" --optim.learning_rate 5e-4 \
  --ppo.num_train_epochs null --ppo.total_episodes "$episodes" --ppo.micro_batch_size 16 --use-lora \
  --run_dir runs/smollm2/ppo-lora
jaxrlhf grpo recipes/smollm2/grpo "${short[@]}" --optim.learning_rate 2e-4 --grpo.total_episodes "$episodes" \
  --grpo.micro_batch_size 16

# Loss, learning rate, mean reward and KL of PPO, and its metrics as CSV; then all three runs over each other.
jaxrlhf plot runs/smollm2/ppo
jaxrlhf plot runs/smollm2/ppo runs/smollm2/ppo-lora runs/smollm2/grpo --output training.png

# Four completions of each of 20 prompts, ranked by the reward (BEST, MEDIUM, WORST), with statistics and as JSON.
jaxrlhf evaluate runs/smollm2/ppo --prompts data/held_out.jsonl --num-prompts "$(quick 20 3)" --num-completions 4 \
  --output generations.json

# The table of SFT, PPO, PPO with LoRA and GRPO: reward, KL, win rate, time and memory.
models=(runs/smollm2/sft runs/smollm2/ppo runs/smollm2/ppo-lora runs/smollm2/grpo)
questions=(--prompts data/held_out.jsonl --num-prompts "$(quick 72 3)" --num-completions 2 --max-new-tokens 24)
jaxrlhf compare "${models[@]}" "${questions[@]}" --reward-model runs/smollm2/reward --show 1 --output comparison
# The same by two functions that know the right answers and that nothing was trained on.
jaxrlhf compare "${models[@]}" "${questions[@]}" --show 0 --output answers.json \
  --reward.components.0.function "$scripts/recipe_data.py:polite" \
  --reward.components.1.function "$scripts/recipe_data.py:right_tip"
