# The teaching notebook (docs/recipes/notebook.md) as a script; scripts/make_notebook.py makes a notebook of its cells.
#
#   python scripts/recipe_notebook.py       (QUICK=1: fewer steps of everything; OUTPUT=folder for what it writes)

# pyright: reportArgumentType=false, reportCallIssue=false
# (sections of a config are given as dicts, and NumPy arrays where jax converts them)

# %% [markdown]
# # RLHF, step by step
#
# Three stages turn a language model into one that answers as people prefer:
#
# 1. **Supervised fine-tuning** (SFT): the model learns from written answers how an answer looks.
# 2. **A reward model** learns from pairs of answers, of which one is better, to give a score to any answer.
# 3. **PPO** changes the model so that its own answers get higher scores, without moving far from the SFT model.
#
# This notebook makes each of them with functions of jaxrlhf, the reward model and a first PPO step by hand, so that
# every number can be looked at. At the end the answers of both models are compared.
#
# The model is a stand-in: GPT-2 with two narrow layers, which needs no network and trains in a minute. A model of the
# Hugging Face hub takes its place by changing one line, `MODEL`.

# %%
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path

ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "scripts" / "stand_in.py").is_file())
sys.path.insert(0, str(ROOT / "scripts"))
warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars of downloads are text here

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import recipe_data
import stand_in

import jaxrlhf

MODEL = "stand-in"  # or a folder or hub id: "openai-community/gpt2"
SMALL = MODEL == "stand-in"
RATES = {"sft": 3e-3, "reward": 1e-3, "ppo": 1e-4} if SMALL else {"sft": 2e-5, "reward": 1e-5, "ppo": 3e-6}
QUICK = os.environ.get("QUICK") == "1"  # fewer steps of everything
OUTPUT = Path(os.environ.get("OUTPUT", ROOT / "runs" / "recipes" / "notebook"))
OUTPUT.mkdir(parents=True, exist_ok=True)
os.chdir(OUTPUT)

# %% [markdown]
# ## The data
#
# Questions for advice. A good answer is polite and gives the tip that belongs to the question; a bad one is curt, rude,
# or gives another tip. The pairs say which of two answers is better. A quarter of the questions is held out: no stage
# is trained on them.
#
# Every model reads the same text, `Prompt: ... Response: ...`.

# %%
TEMPLATE = "Prompt: {prompt}\nResponse:"
FILES = {"every_tone": (2400, False), "pairs": (800, False), "prompts": (216, False), "held_out": (144, True)}
for name, (rows, held_out) in FILES.items():
    recipe_data.write("pairs" if held_out else name, Path(f"data/{name}.jsonl"), rows, held_out=held_out)


def read(name):
    return [json.loads(line) for line in Path(f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()]


pairs, held_out_pairs = read("pairs"), read("held_out")
print(TEMPLATE.format(**pairs[0]))
print("  chosen:  ", pairs[0]["chosen"])
print("  rejected:", pairs[0]["rejected"])

# %% [markdown]
# ## 1. Supervised fine-tuning
#
# The loss is the mean of `-log p(token | tokens before)` over the tokens of the answers. A quarter of the answers here
# is good; the others are curt, rude, or give another tip. So the model will learn to answer in any tone.

# %%
if SMALL:
    stand_in.write_description(
        Path("description"), "gpt2", "", Path("data/every_tone.jsonl").read_text(encoding="utf-8")
    )
    source = {"path": "description", "init": "random"}
else:
    source = {"path": MODEL}
quiet = {"quiet": True, "sample_every": 0, "tensorboard": False, "report": False}
sft = jaxrlhf.SFTTrainer(
    jaxrlhf.SFTConfig(
        run_dir="sft",
        model=source,
        data={"path": "data/every_tone.jsonl", "template": TEMPLATE},
        train={"batch_size": 16, "max_steps": 120 if QUICK else 600, "num_train_epochs": 100.0},
        optim={"learning_rate": RATES["sft"], "warmup_steps": 20, "schedule": "cosine"},
        logging=quiet,
    ),
    fresh=True,
)
result = sft.train()
sft.save_pretrained("sft-model")
print(f"loss of the last step: {result['loss']:.3f} nats per token")

# %% [markdown]
# ## 2. A reward model
#
# A reward model is the language model with another head: instead of the next token, it gives one number at the last
# token of a text. `load(..., head="linear")` puts a new head on the SFT model.

# %%
tokenizer = jaxrlhf.load_tokenizer("sft-model")
judge, judge_params = jaxrlhf.load("sft-model", head="linear", key=jax.random.key(0))


def pad(sequences, width, left=False):
    """Tokens int32 [B, width] and a mask, bool [B, width], of the real ones."""
    tokens = np.full((len(sequences), width), tokenizer.pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, sequence in enumerate(sequences):
        columns = slice(width - len(sequence), None) if left else slice(len(sequence))
        tokens[row, columns], mask[row, columns] = sequence, True
    return tokens, mask


def answered(rows, column):
    """Prompts with the answers of a column as the reward model reads them; an end token closes the answer."""
    texts = [TEMPLATE.format(**row) + row[column] for row in rows]
    return [[*tokenizer.encode_prompt(text), tokenizer.eos_id] for text in texts]


everything = [answered(rows, column) for rows in (pairs, held_out_pairs) for column in ("chosen", "rejected")]
WIDTH = -(-max(len(text) for texts in everything for text in texts) // 8) * 8
chosen, rejected, held_out_chosen, held_out_rejected = (pad(texts, WIDTH) for texts in everything)
print(f"{len(pairs)} pairs to train on, {len(held_out_pairs)} held out, at most {WIDTH} tokens a text")

# %% [markdown]
# The loss of a pair is `-log sigmoid(chosen - rejected)`: the probability of the better answer under the model of
# Bradley and Terry, as a cross-entropy. A model that cannot tell the two apart has the loss log 2 = 0.693 and an
# accuracy of 0.5.


# %%
def pair_loss(params, chosen, rejected):
    """(loss, accuracy) of a batch of pairs; each side is (tokens, mask), [B, T]."""
    margin = jaxrlhf.last_token_scores(params, judge, *chosen) - jaxrlhf.last_token_scores(params, judge, *rejected)
    return -jnp.mean(jax.nn.log_sigmoid(margin)), jnp.mean(margin > 0)


EPOCHS, BATCH = (2 if QUICK else 5), 16
optimizer = optax.adamw(RATES["reward"])


@jax.jit
def reward_step(params, moments, chosen, rejected):
    (loss, accuracy), gradient = jax.value_and_grad(pair_loss, has_aux=True)(params, chosen, rejected)
    change, moments = optimizer.update(gradient, moments, params)
    return optax.apply_updates(params, change), moments, loss, accuracy


evaluate_pairs = jax.jit(pair_loss)
moments, history = optimizer.init(judge_params), []
before = evaluate_pairs(judge_params, held_out_chosen, held_out_rejected)
print(f"before training   held-out loss {before[0]:.3f}   held-out accuracy {before[1]:.3f}")
for epoch in range(EPOCHS):
    order, parts = np.random.default_rng(epoch).permutation(len(pairs)), []
    for rows in order.reshape(-1, BATCH):
        batch = [tuple(array[rows] for array in side) for side in (chosen, rejected)]
        judge_params, moments, *numbers = reward_step(judge_params, moments, *batch)
        parts.append(numbers)
    held_out = evaluate_pairs(judge_params, held_out_chosen, held_out_rejected)
    history.append([*np.mean(parts, axis=0), *map(float, held_out)])
    loss, accuracy, held_out_loss, held_out_accuracy = history[-1]
    print(
        f"epoch {epoch + 1} of {EPOCHS}   loss {loss:.3f}   accuracy {accuracy:.3f}"
        f"   held-out loss {held_out_loss:.3f}   held-out accuracy {held_out_accuracy:.3f}"
    )

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
epochs = np.arange(1, EPOCHS + 1)
for panel, name, column in ((panels[0], "loss", 0), (panels[1], "accuracy", 1)):
    panel.plot(epochs, [row[column] for row in history], "o-", label="training")
    panel.plot(epochs, [row[column + 2] for row in history], "s-", label="held out")
    panel.axhline({"loss": np.log(2), "accuracy": 0.5}[name], color="gray", linestyle=":", label="chance")
    panel.set(title=f"Reward model: {name}", xlabel="epoch", xticks=epochs)
panels[0].set_ylim(bottom=0)
panels[1].set_ylim(0.45, 1.02)
panels[1].legend()
figure.savefig("reward_model.png")

# %% [markdown]
# ### Named examples
#
# Does it recognise the better answer? The last example is about something that it has never read of.


# %%
@partial(jax.jit, static_argnames="model")
def scores_of(params, tokens, mask, *, model):
    return jaxrlhf.last_token_scores(params, model, tokens, mask)


NAMED = [
    {
        "name": "helpful or curt",
        "prompt": "How can I sleep well?",
        "good": " Happy to help. Go to bed at the same hour and read a little.",
        "bad": " Who cares?",
    },
    {
        "name": "polite or rude",
        "prompt": "Do you know how to boil an egg?",
        "good": " Good question. Put it into hot water for seven minutes.",
        "bad": " Stop asking me. Put it into hot water for seven minutes.",
    },
    {
        "name": "right or wrong tip",
        "prompt": "Tell me how to grow tomatoes, please.",
        "good": " Thank you for asking. Give them full sun and water the roots each morning.",
        "bad": " Thank you for asking. Go to bed at the same hour and read a little.",
    },
    {
        "name": "an unknown subject",
        "prompt": "What is the capital of France?",
        "good": " Good question. It is Paris.",
        "bad": " Everyone knows this. It is Paris.",
    },
]
good, bad = (
    np.asarray(scores_of(judge_params, *pad(answered(NAMED, side), WIDTH), model=judge)) for side in ("good", "bad")
)
for row, better, worse in zip(NAMED, good, bad, strict=True):
    print(f"{row['name']}: {'recognised' if better > worse else 'NOT recognised'}")
    print(f"  Prompt: {row['prompt']}")
    print(f"  {better:+6.2f}  Response:{row['good']}")
    print(f"  {worse:+6.2f}  Response:{row['bad']}")

# %% [markdown]
# Exported, it is a sequence classification model of transformers, and everything of jaxrlhf that takes a reward model
# can use it. `jaxrlhf.score` gives the scores from above.

# %%
jaxrlhf.export("reward-model", judge, judge_params, source="sft-model", tokenizer=tokenizer)
prompts = [TEMPLATE.format(**row) for row in NAMED]
again = jaxrlhf.score("reward-model", prompts, [row["good"] for row in NAMED])
print("largest difference:", f"{np.abs(again - good).max():.0e}")

# %% [markdown]
# ## 3. Sampling, log-probabilities and KL
#
# The policy, the model that PPO trains, begins as the SFT model. Its answers are drawn token by token, here at
# temperature 0.7 from the most probable tokens that together have 90 % of the probability (top-p 0.9).
#
# The log-probability of an answer is the sum of those of its tokens. The same sum under the reference, the SFT model,
# gives an estimate of the KL divergence: `log p(answer | policy) - log p(answer | reference)`. As the two are still the
# same model, it is exactly 0.

# %%
SAMPLING = jaxrlhf.Sampling(response_length=32, temperature=0.7, top_p=0.9)
policy, policy_params = jaxrlhf.load("sft-model")
reference_params = policy_params
PROMPT_WIDTH = 32


def sample(params, prompts, key):
    """A response to each prompt: a rollout (arrays) and the texts."""
    ids = [tokenizer.encode_prompt(TEMPLATE.format(prompt=prompt)) for prompt in prompts]
    number = len(prompts)
    batch = jaxrlhf.Prompts(*pad(ids, PROMPT_WIDTH, left=True), np.arange(number), np.zeros(number, np.int32))
    copy, copied = jaxrlhf.inference_copy(policy, params, "float32")
    rollout = jaxrlhf.generate(copied, copy, batch, key, SAMPLING, tokenizer.stop_ids, tokenizer.pad_id)
    rows = zip(rollout.tokens[:, PROMPT_WIDTH:], rollout.response_mask, strict=True)
    return rollout, [tokenizer.decode([*map(int, row[mask])]) for row, mask in jax.device_get([*rows])]


@jax.jit
def logprobs(params, rollout):
    """Log-probability of every response token, [B, R]."""
    return jaxrlhf.sequence_logprobs(params, policy, rollout, SAMPLING.temperature)[0]


def rewards_of(rollout):
    return np.asarray(scores_of(judge_params, rollout.tokens, rollout.mask, model=judge))


questions = list(dict.fromkeys(row["prompt"] for row in read("prompts")))[:48]
rollout, answers = sample(policy_params, questions, jax.random.key(1))
old = logprobs(policy_params, rollout)
reference = logprobs(reference_params, rollout)
kl = np.asarray(jnp.sum(old - reference, axis=1))
rewards = rewards_of(rollout)
for i in range(4):
    print(f"Prompt: {questions[i]}\n  Response:{answers[i]}")
    print(f"  log-prob {jnp.sum(old[i]):8.3f}   reference {jnp.sum(reference[i]):8.3f}   KL {kl[i]:.3f}", end="")
    print(f"   reward {rewards[i]:+.2f}")
print(f"average reward of {len(questions)} responses: {rewards.mean():+.3f}")

# %% [markdown]
# ## 4. A PPO step by hand
#
# The advantage says how much better an answer is than usual. In the simplest form it is `reward - kl_coef * KL`, less
# the mean over the batch (and divided by its standard deviation). Every token of an answer gets the advantage of the
# answer.
#
# The objective compares the probability of each token with that at sampling time, `ratio = p_new / p_old`, and is the
# mean of
#
# `min(ratio * advantage, clip(ratio, 0.8, 1.2) * advantage)`
#
# so that nothing is gained by moving a token's probability by more than a fifth. Before the first optimizer step the
# policy is the one that sampled: every ratio is 1. The KL is estimated from these responses alone; an estimate may be
# negative, which the divergence itself never is.

# %%
KL_COEF, CLIP = 0.1, 0.2
advantages = rewards - KL_COEF * kl
advantages = (advantages - advantages.mean()) / advantages.std()
ppo_optimizer = optax.adam(RATES["ppo"])


def clipped_objective(params, rollout, old, advantages):
    mask = rollout.response_mask
    new = logprobs(params, rollout)
    ratio = jnp.exp(new - old)
    gain = jnp.minimum(ratio * advantages[:, None], jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages[:, None])
    return jnp.sum(gain, where=mask) / jnp.sum(mask), (new, ratio)


@jax.jit
def ppo_step(params, moments, rollout, old, advantages):
    maximise = jax.value_and_grad(clipped_objective, has_aux=True)
    (objective, (new, ratio)), gradient = maximise(params, rollout, old, advantages)
    change, moments = ppo_optimizer.update(jax.tree.map(jnp.negative, gradient), moments, params)
    return optax.apply_updates(params, change), moments, objective, new, ratio


ppo_moments, steps, mask = ppo_optimizer.init(policy_params), [], np.asarray(rollout.response_mask)
print("step   objective   ratio: mean     min     max   clipped       KL")
for step in range(5):
    policy_params, ppo_moments, objective, new, ratio = ppo_step(policy_params, ppo_moments, rollout, old, advantages)
    ratios = np.asarray(ratio)[mask]
    kl_now = float(jnp.sum(new - reference) / len(questions))
    steps.append({"objective": float(objective), "ratio": ratios, "kl": kl_now})
    clipped = np.mean(np.abs(ratios - 1) > CLIP)
    print(
        f"{step:4}   {objective:9.4f}   {ratios.mean():11.4f}  {ratios.min():6.3f}  {ratios.max():6.3f}"
        f"   {clipped:7.1%}   {kl_now:6.3f}"
    )
new_rollout, _ = sample(policy_params, questions, jax.random.key(1))
print(
    f"average reward {rewards.mean():+.3f} -> {rewards_of(new_rollout).mean():+.3f} (the same prompts and random keys)"
)

# %% [markdown]
# The loop of PPO is this again and again: sample, score, a few steps on the clipped objective.
#
# ## 5. A PPO step of the library
#
# `PPOTrainer` makes the same step with two refinements: a critic, a second model, predicts the reward that is still to
# come after each token, and the advantage of a token is measured against that prediction (generalised advantage
# estimation); and the KL is subtracted token by token. `ppo_step` returns everything that the update was made of, and
# `inspect` shows it.

# %%
config = jaxrlhf.PPOConfig(
    run_dir="ppo",
    model={"path": "sft-model"},
    data={"path": "data/prompts.jsonl", "template": TEMPLATE},
    reward={"model": "reward-model"},
    sampling={"response_length": 32, "temperature": 0.7, "top_p": 0.9},
    ppo={
        "total_episodes": 64 * (10 if QUICK else 50),
        "batch_size": 64,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "kl_coef": KL_COEF,
        "cliprange": CLIP,
    },
    critic={"learning_rate": 3 * RATES["ppo"]},
    optim={"learning_rate": RATES["ppo"], "eps": 1e-5, "schedule": "constant"},
    logging=quiet,
)
trainer = jaxrlhf.PPOTrainer(config, fresh=True)
many = list(dict.fromkeys(row["prompt"] for row in read("prompts")))[:64]
print("update    reward        KL   policy loss   value loss   ratio   clipped")
update = {}
for number in range(1, 6):
    update = trainer.ppo_step([TEMPLATE.format(prompt=prompt) for prompt in many])
    print(
        f"{number:6}   {np.mean(update['rewards']):+7.3f}   {update['objective/kl']:7.3f}"
        f"   {update['policy_loss']:+11.4f}   {update['value_loss']:10.4f}"
        f"   {update['val/ratio']:.3f}   {update['policy/clipfrac_avg']:7.1%}"
    )
print(f"the first response of the last update:{update['generated_texts'][0]}")

# %% [markdown]
# The tokens of the first two responses of the last update. The score is the reward of the last token; before it, the
# reward is `-kl_coef * kl`. `value` is what the critic expects, `td_error` by how much a token changed that, and
# `ratio` the probability of the token after the update divided by that before it.

# %%
experience = jax.tree.map(lambda array: array[:2], update["experience"])
table = jaxrlhf.inspect(experience, trainer.tokenizer, new_logprobs=trainer.logprobs(experience.rollout))
print(table)

# %% [markdown]
# ## 6. PPO
#
# The whole run is one call. It writes its metrics to `metrics.jsonl`, one line for each update.

# %%
jaxrlhf.PPOTrainer(config, fresh=True).train()
log = [json.loads(line) for line in Path("ppo/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
curves = {name: [row[f"objective/{name}"] for row in log] for name in ("scores", "kl")}
for row in log[:: max(1, len(log) // 5)] + log[-1:]:
    print(f"update {row['step']:3}   reward {row['objective/scores']:+.3f}   KL {row['objective/kl']:.3f}", end="")
    print(f"   response length {row['val/response_length']:.1f}" if "val/response_length" in row else "")

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
for panel, name, label in ((panels[0], "scores", "average reward"), (panels[1], "kl", "KL, nats per response")):
    panel.plot([row["step"] for row in log], curves[name])
    panel.set(title=f"PPO: {label}", xlabel="update")
figure.savefig("ppo.png")

# %% [markdown]
# ## 7. SFT against RLHF
#
# Both models answer three prompts that neither has seen, with the same random keys.

# %%
tuned_params = jaxrlhf.load("ppo")[1]
held_out_prompts = list(dict.fromkeys(row["prompt"] for row in held_out_pairs))
tips = {row["prompt"]: row["tip"] for row in held_out_pairs}
models = {"SFT": reference_params, "RLHF": tuned_params}
sampled = {name: sample(params, held_out_prompts, jax.random.key(2)) for name, params in models.items()}
reward = {name: rewards_of(rollout) for name, (rollout, _) in sampled.items()}
improvement = reward["RLHF"] - reward["SFT"]
for i in range(3):
    print(f"Prompt: {held_out_prompts[i]}")
    for name, (_, texts) in sampled.items():
        print(f"  {name:4}  {reward[name][i]:+6.2f}  {texts[i]}")
    print(f"  improvement {improvement[i]:+.2f}")
print(f"average improvement on these three: {improvement[:3].mean():+.2f}")

# %% [markdown]
# Three prompts are few. The same on all held-out prompts, with 95 % intervals from 2,000 resamples of the prompts. The
# reward model was trained on, so a higher reward alone could also mean that the policy has found its errors. The last
# two rows are measured by rules that know the right answers and that no stage was trained on.


# %%
def with_interval(values):
    draws = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(np.asarray(values)[draws].mean(axis=1), [0.025, 0.975])
    return f"{np.mean(values):+.2f} [{low:+.2f}, {high:+.2f}]"


rows = {"reward": reward}
for title, rule in (("polite", recipe_data.polite), ("right tip", recipe_data.right_tip)):
    columns = () if title == "polite" else ([tips[prompt] for prompt in held_out_prompts],)
    rows[title] = {name: np.array(rule(texts, *columns)) for name, (_, texts) in sampled.items()}
print(f"{len(held_out_prompts)} held-out prompts")
print(f"{'':10}  {'SFT':22}  {'RLHF':22}  {'improvement':22}".rstrip())
for title, values in rows.items():
    cells = [values["SFT"], values["RLHF"], values["RLHF"] - values["SFT"]]
    print(f"{title:10}  " + "  ".join(f"{with_interval(cell):22}" for cell in cells).rstrip())
moved = logprobs(tuned_params, sampled["RLHF"][0]) - logprobs(reference_params, sampled["RLHF"][0])
print(f"KL of RLHF to SFT: {float(jnp.mean(jnp.sum(moved, axis=1))):.2f} nats per response")
