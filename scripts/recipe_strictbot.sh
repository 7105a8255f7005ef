#!/usr/bin/env bash
# StrictBot: PPO on Qwen2.5-0.5B-Instruct with a reward of a model and rules (docs/recipes/strictbot.md), offline, on a
# small stand-in for Qwen2.5.
#   bash scripts/recipe_strictbot.sh [OUTPUT]     (default: runs/recipes/strictbot); run it again to resume
#
# MODEL=...      the real model instead: a folder or hub id (Qwen/Qwen2.5-0.5B-Instruct)
# TOKENIZER=...  a tokenizer for the stand-in: a folder or hub id
# DATA=...       a folder with answers.json, pairs.json, questions.json and held_out.json
# QUICK=1        a few steps of each stage
set -euo pipefail
data=$([ -z "${DATA:-}" ] || realpath "$DATA")
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
prepare plots
scripts=$PWD/scripts output=${1:-runs/recipes/strictbot}
mkdir -p "$output"
cd "$output"

# Questions of four categories; answers at any level of strictness, of which some are wrong and some insult; pairs.
make() { python "$scripts/recipe_data_strictbot.py" "$@"; }
if [ -z "$data" ]; then
  data=data
  make sft data/answers.json --rows 4000
  make pairs data/pairs.json --rows 4000
  make prompts data/questions.json --rows 278
  make prompts data/held_out.json --rows 128 --held-out
fi

# A Qwen2.5 of two narrow layers. Small models need larger steps.
model=${MODEL:-model} sft=() reward=() short=() ppo=()
if [ -z "${MODEL:-}" ]; then
  make text data/text.jsonl --rows 6000
  [ -d model ] || python "$scripts/stand_in.py" qwen2.5-0.5b-instruct model --text data/text.jsonl \
    --steps "$(quick 500 4)" ${TOKENIZER:+--tokenizer "$TOKENIZER"}
  sft=(--optim.learning_rate 1e-3 --train.micro_batch_size 16 --train.max_steps "$(quick 120 4)")
  reward=(--optim.learning_rate 2e-3 --train.micro_batch_size 16 --train.max_steps "$(quick 300 4)")
  short=(--sampling.response_length 16)  # as long as most answers: with one padded length, half the programs
  ppo=(--optim.learning_rate 2e-3 --optim.schedule linear --ppo.micro_batch_size null --ppo.kl_coef 0.1
    --ppo.batch_size "$(quick 128 32)" --ppo.total_episodes "$(quick 6144 64)" --data.max_prompt_length 32)
elif [ -n "${QUICK:-}" ]; then
  sft=(--train.max_steps 4) reward=(--train.max_steps 4)
  ppo=(--ppo.batch_size 32 --ppo.total_episodes 64)
fi

# Adapters that answer in StrictBot's form, and the reward model: an MLP head on the frozen SFT model.
jaxrlhf sft recipes/strictbot/sft --model.path "$model" --data.path "$data/answers.json" "${sft[@]}"
jaxrlhf reward recipes/strictbot/reward --data.path "$data/pairs.json" "${reward[@]}"

# 16 prompts, 24 episodes: the settings of the project's script. It also writes the merged model.
jaxrlhf ppo recipes/strictbot/ppo_short --data.path "$data/questions.json" "${short[@]}"

# The head as rm.pt, and back to a reward model.
if ! python -c "import torch" 2> /dev/null; then
  echo "rm.pt is left out: torch is not installed"
elif [ ! -d converted ]; then
  python "$scripts/recipe_rm_pt.py" runs/strictbot/reward rm.pt
  jaxrlhf convert-rm rm.pt runs/strictbot/merged converted
fi

# The composite reward, validated on questions that are not trained on.
jaxrlhf ppo recipes/strictbot/ppo --data.path "$data/questions.json" "${ppo[@]}"
jaxrlhf plot runs/strictbot/ppo

# Before and after, by category: the reward with its parts, then an exact check that nothing was trained on.
questions=(--prompts "$data/held_out.json" --num-prompts "$(quick 128 8)" --num-completions 1 --rollout.slots 128)
jaxrlhf compare runs/strictbot/merged runs/strictbot/ppo "${questions[@]}" --by category --output comparison
if [ "$data" = data ]; then
  jaxrlhf compare runs/strictbot/merged runs/strictbot/ppo "${questions[@]}" --by category --show 0 \
    --reward "$scripts/recipe_data_strictbot.py:truth" --output truth.json
fi

# The best of 8 candidates for each question.
jaxrlhf generate runs/strictbot/ppo --prompts "$data/held_out.json" --data.max_rows "$(quick 48 8)" --n 8 --keep best \
  --rollout.slots 384 --out best.jsonl

# A Hugging Face folder, and the answer to a single question.
[ -d strictbot ] || jaxrlhf export runs/strictbot/ppo strictbot
jaxrlhf generate strictbot --prompt $'<|user|> I think that bats are blind. <|end|>\n<|assistant|>' --max-new-tokens 32

# Scores of (question, answer) pairs.
python - << 'END'
import jaxrlhf

question = "<|user|> I think that bats are blind. <|end|>\n<|assistant|>"
answers = [" Pay attention! Bats can see well. Do your homework!", " Keep asking! Bats are blind. How stupid of you!"]
for answer, score in zip(answers, jaxrlhf.score("runs/strictbot/reward", [question] * 2, answers), strict=True):
    print(f"{score:+.2f} {answer}")
END
