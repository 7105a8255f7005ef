"""One PPO update from Python, and its ten steps as values.

    python scripts/recipe_modular.py MODEL REWARD_MODEL PROMPTS

MODEL is the SFT model, a run directory, folder or hub id; PROMPTS a data file. scripts/recipe_modular.sh runs it.
"""

import json
import sys
from pathlib import Path

import numpy as np

import jaxrlhf
from jaxrlhf import PPOConfig, PPOTrainer
from jaxrlhf import config as c

model, reward_model, file = sys.argv[1:]
config = PPOConfig(
    model=c.ModelSource(path=model),
    lora=c.LoRA(enabled=True, rank=16, alpha=32),
    reward=c.RewardSource(model=reward_model),
    sampling=c.Sampling(response_length=10, temperature=1.0, top_k=50, top_p=0.95),
    optim=c.Optim(learning_rate=1e-5),
    critic=c.Critic(learning_rate=1e-4),
    ppo=c.PPO(
        batch_size=32,
        gamma=0.99,
        lam=0.95,
        kl_coef=0.1,
        cliprange=0.2,
        value_target="reward_to_go",
        cliprange_value=None,
    ),
)
trainer = PPOTrainer(config)
with Path(file).open(encoding="utf-8") as lines:
    prompts = [json.loads(line)["prompt"] for line in lines][:32]
results = trainer.ppo_step(prompts)
for text, reward in list(zip(results["generated_texts"], results["rewards"], strict=True))[:3]:
    print(f"reward {reward:+.3f}  {text!r}")
print(f"policy_loss {results['policy_loss']:.4f}  value_loss {results['value_loss']:.4f}")

experience = results["experience"]
mask = np.asarray(experience.rollout.response_mask)
table = jaxrlhf.inspect(experience, trainer.tokenizer, new_logprobs=trainer.logprobs(experience.rollout))
print(table)

kl = np.asarray(experience.old_logprobs - experience.ref_logprobs)[mask]
ratio = np.array(table.columns["ratio"])
print(
    f"""
 1 generate            {mask.sum()} tokens, log-probs of policy and SFT model: old_logprobs, ref_logprobs
 2 KL per token        mean {kl.mean():.4f}
 3 sequence rewards    mean {np.mean(results["rewards"]):.3f}: scores
 4 KL-adjusted         sum over a response, mean {np.asarray(experience.rewards).sum(1).mean():.3f}: rewards
 5 values              mean {np.asarray(experience.values)[mask].mean():.3f}: values
 6 TD errors           mean {np.mean(table.columns["td_error"]):.3f}
 7 GAE                 mean {np.mean(table.columns["raw_advantage"]):.3f}, whitened for the loss: advantages
 8 reward-to-go        mean {np.asarray(experience.returns)[mask].mean():.3f}: returns
 9 value update        loss {results["value_loss"]:.4f}, learning rate {config.critic.learning_rate}
10 policy update       ratio {ratio.min():.3f} to {ratio.max():.3f}, clipped {results["policy/clipfrac_avg"]:.3f}"""
)
