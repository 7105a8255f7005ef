"""Record one update of TRL's PPOTrainer, with models of tests/fixtures/models, in tests/fixtures/trl.

    python scripts/make_trl_fixtures.py          (needs torch, trl==1.8.0 and requests: any environment)

`PPOTrainer.train` itself runs; only generation is replaced, by fixed responses. The policy is `llama`, the reference
the same weights times REFERENCE, the value model `llama-score`, the reward model `qwen2-score`. One file per case, with
its settings as JSON under `about` in the metadata, and (E epochs, M mini-batches, A micro-batches of each):

    tokens, prompt_lengths, response_lengths, finished    [B, T], [B], [B], [B]   left-padded prompts, padded responses
    raw_scores, scores                        [B]      of the reward model; after the missing-EOS penalty
    logprobs, ref_logprobs, values, rewards, advantages, returns    [B, R]   as `train` holds them, padding included
    rows                                      [E, M A, B / (M A)]   of each forward; in the order of `rows`:
    new_logprobs, new_values, entropies       [E, B, R]
    loss/policy, loss/value                   [E, M A]
    norm/policy, norm/critic                  [optimizer steps]     of the gradient
    change/policy/NAME, change/critic/NAME    [5]      of the parameters by the update: see `digest` in make_fixtures.py
    metric/NAME                               []       as TRL logs it

functions.safetensors holds results of single functions of TRL on a ragged random batch, losses.safetensors those of its
preference losses (trl_losses.py), distillation.safetensors those of its divergence (trl_distillation.py),
groups.safetensors the advantages and losses of its GRPOTrainer and RLOOTrainer (see `groups`).
"""

import json
import pathlib
import shutil
import sys
import tempfile
from typing import Any

import datasets
import numpy as np
import tokenizers
import torch  # pyright: ignore[reportMissingImports]
import transformers
import trl  # pyright: ignore[reportMissingImports]
import trl_distillation
import trl_losses
from make_fixtures import digest
from safetensors.numpy import save_file
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # pyright: ignore[reportMissingImports]
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer  # pyright: ignore[reportMissingImports]
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # pyright: ignore[reportMissingImports]
from trl.trainer.utils import entropy_from_logits, selective_log_softmax  # pyright: ignore[reportMissingImports]

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "tests" / "fixtures"
REFERENCE = 0.9
B, R, V, PAD, EOS, STOP = 8, 7, 64, 0, 2, 5
PROMPT_LENGTHS = (1, 6, 3, 5, 2, 4, 6, 1)
FULL = (R,) * B
RAGGED = (3, R, 1, 5, R, 6, 2, 4)  # the second is cut short, the fifth ends in the last column

SETTINGS = {
    "num_ppo_epochs": 3,
    "num_mini_batches": 1,
    "temperature": 0.7,
    "kl_coef": 0.3,
    "cliprange": 0.1,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "gamma": 0.98,
    "lam": 0.9,
    "whiten_rewards": False,
    "missing_eos_penalty": 0.5,
}
# name: lengths of the responses, the token that ends them, micro-batches per rollout, settings that differ
CASES: dict[str, tuple[tuple[int, ...], int, int, dict[str, Any]]] = {
    "full": (FULL, EOS, 1, {}),
    "full-whitened": (FULL, EOS, 1, {"whiten_rewards": True}),
    "ragged": (RAGGED, EOS, 1, {}),
    "ragged-whitened": (RAGGED, EOS, 1, {"whiten_rewards": True}),
    "ragged-undiscounted": (RAGGED, EOS, 1, {"gamma": 1.0, "lam": 1.0}),
    "k3": (RAGGED, EOS, 1, {"num_ppo_epochs": 1, "kl_estimator": "k3"}),
    "stop-token": (RAGGED, STOP, 1, {"num_ppo_epochs": 1}),
    "micro-batches": (RAGGED, EOS, 2, {"num_ppo_epochs": 1}),
    "mini-batches": (FULL, EOS, 2, {"num_mini_batches": 2}),
}
OPTIM = {"learning_rate": 5e-4, "adam_epsilon": 1e-3, "weight_decay": 0.0}
ROLLED_OUT = ("scores", "logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")


def tokenizer() -> Any:
    """Minimal tokenizer for TRL: left padding and two special ids."""
    words = {f"t{i}": i for i in range(V)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t3"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=f"t{PAD}", eos_token=f"t{EOS}", unk_token="t3", padding_side="left"
    )


def responses(lengths: tuple[int, ...], stop: int) -> np.ndarray:
    """[B, R] random tokens without special ids; those shorter than R, and the fifth row, end in the stop token."""
    tokens = np.random.default_rng(1).integers(STOP + 1, V, (B, R))
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = PAD
        if length < R:
            row[length - 1] = stop
    if lengths is RAGGED:
        tokens[4, R - 1] = stop
    return tokens


def model_of(name: str, scale: float = 1.0) -> Any:
    """A model of tests/fixtures/models in float32, its weights scaled."""
    folder = FIXTURES / "models" / name
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for weight in model.parameters():
        weight.data *= scale
    return model


class Recorder:
    """Record local variables of `PPOTrainer.train` when it calls the functions wrapped here."""

    def __init__(self, trainer: Any, written: np.ndarray) -> None:
        self.found: dict[str, Any] = {}
        self.forwards: list[dict[str, np.ndarray]] = []
        self.norms: dict[str, list[float]] = {"policy": [], "critic": []}
        self.trainer = trainer
        roles = {"policy": trainer.policy_model, "critic": trainer.value_model}
        get_reward, backward = ppo_trainer.get_reward, trainer.accelerator.backward
        self.before = self.weights(roles)

        def generation(model: Any, queries: Any, _rows: int, pad: int, config: Any) -> tuple[Any, Any]:
            whole = torch.cat([queries, torch.tensor(written)], dim=1)
            logits = ppo_trainer.forward(model, whole, pad).logits[:, queries.shape[1] - 1 : -1]
            return whole, logits / config.temperature

        def reward(model: Any, *arguments: Any) -> Any:
            result = get_reward(model, *arguments)
            if model is trainer.reward_model:
                self.found["raw_scores"] = result[1].clone()
            return result

        def gradient(loss: Any) -> None:
            here = sys._getframe(1).f_locals
            names = {"new_logprobs": "new_logprobs", "new_values": "vpred", "rows": "micro_batch_inds"}
            record = {ours: torch.as_tensor(here[theirs]).detach().numpy() for ours, theirs in names.items()}
            record["entropies"] = entropy_from_logits(here["logits"].detach()).numpy()
            record["loss/policy"], record["loss/value"] = here["pg_loss"].item(), here["vf_loss"].item()
            self.forwards.append(record)
            backward(loss)

        def stepped(_optimizer: Any, *_: Any) -> None:
            for role, model in roles.items():
                norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
                self.norms[role].append(norms.norm().item())

        def log(metrics: dict[str, float]) -> None:
            here = sys._getframe(1).f_locals
            self.found |= {name: here[name].clone() for name in ROLLED_OUT}
            self.found["tokens"] = here["query_responses"].clone()
            skipped = ("eps", "lr", "episode")
            self.found |= {f"metric/{k}": np.float64(v) for k, v in metrics.items() if k not in skipped}

        ppo_trainer.batch_generation, ppo_trainer.get_reward = generation, reward
        trainer.accelerator.backward, trainer.log = gradient, log
        trainer.optimizer.optimizer.register_step_pre_hook(stepped)
        try:
            trainer.train()
        finally:
            ppo_trainer.get_reward = get_reward
        after = self.weights(roles)
        self.changes = {f"change/{name}": digest(after[name] - self.before[name]) for name in after}

    def weights(self, roles: dict[str, Any]) -> dict[str, np.ndarray]:
        """Every parameter of both roles, copied."""
        return {
            f"{role}/{name}": weight.detach().numpy().copy()
            for role, model in roles.items()
            for name, weight in model.named_parameters()
        }

    def arrays(self, epochs: int, forwards: int) -> dict[str, np.ndarray]:
        """All recorded arrays, by the names in the docstring of this file."""
        found = {name: np.asarray(value) for name, value in self.found.items()} | self.changes
        for name in self.forwards[0]:
            stacked = np.stack([record[name] for record in self.forwards])
            per_row = name in ("new_logprobs", "new_values", "entropies")
            found[name] = stacked.reshape(epochs, *((B, R) if per_row else (forwards, *stacked.shape[1:])))
        found |= {f"norm/{role}": np.array(norms) for role, norms in self.norms.items()}
        return {k: np.array(v, np.int32 if v.dtype == np.int64 else v.dtype, order="C") for k, v in found.items()}


def run(name: str) -> dict[str, Any]:
    """Run one update of TRL."""
    lengths, stop, micro_batches, changes = CASES[name]
    settings = SETTINGS | changes
    generator = np.random.default_rng(0)
    # Two batches' worth, of which one is used: on the last of a pass accelerate would step after every micro-batch.
    prompts = [generator.integers(STOP + 1, V, n).tolist() for n in PROMPT_LENGTHS * 2]
    torch.manual_seed(0)
    np.random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=PPOConfig(
                output_dir=folder,
                per_device_train_batch_size=B // micro_batches,
                gradient_accumulation_steps=micro_batches,
                total_episodes=B,
                response_length=R,
                stop_token_id=stop,
                num_sample_generations=0,
                lr_scheduler_type="constant",
                optim="adamw_torch",
                bf16=False,
                gradient_checkpointing=False,
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                **OPTIM,
                **settings,
            ),
            processing_class=tokenizer(),
            model=model_of("llama"),
            ref_model=model_of("llama", REFERENCE),
            reward_model=model_of("qwen2-score"),
            value_model=model_of("llama-score"),
            train_dataset=datasets.Dataset.from_dict({"input_ids": prompts}),
            eval_dataset=datasets.Dataset.from_dict({"input_ids": prompts}),
        )
        written = responses(lengths, stop)
        found = Recorder(trainer, written).arrays(settings["num_ppo_epochs"], micro_batches)
    prompt_width = found["tokens"].shape[1] - R
    found["prompt_lengths"] = (found["tokens"][:, :prompt_width] != PAD).sum(1).astype(np.int32)
    found["response_lengths"] = np.array(lengths, np.int32)
    found["finished"] = (written == stop).any(1)
    about = {"trl": trl.__version__, "settings": settings, "optim": OPTIM, "reference": REFERENCE}
    # one entry: several are written in any order
    save_file(found, FIXTURES / "trl" / f"{name}.safetensors", metadata={"about": json.dumps(about)})
    return found


def functions() -> None:
    """Results of TRL's separate functions on a ragged random batch."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn((B, R, V), generator=generator)
    tokens = torch.tensor(responses(RAGGED, EOS))
    mask = tokens != PAD
    values = 2 + 3 * torch.randn((B, R), generator=generator)
    found = {
        "logits": logits,
        "tokens": tokens.int(),
        "values": values,
        "masked_mean": ppo_trainer.masked_mean(values, mask),
        "masked_var": ppo_trainer.masked_var(values, mask),
        "whitened": ppo_trainer.masked_whiten(values, mask),
        "whitened-mean-kept": ppo_trainer.masked_whiten(values, mask, shift_mean=False),
        "logprobs": selective_log_softmax(logits, tokens),
        "entropies": entropy_from_logits(logits),
        "first_pad": ppo_trainer.first_true_indices(~mask).int(),
    }
    save_file(
        {name: value.numpy() for name, value in found.items()},
        FIXTURES / "trl" / "functions.safetensors",
        metadata={"about": json.dumps({"trl": trl.__version__})},
    )


GROUP = 4  # responses to a prompt
# the second group is without variance, the third nearly so
GROUP_SCORES = (1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0, 0.5, 0.5, 0.5, 0.5078125, 3.0, -1.0, 0.25, 7.5)
GROUP_LENGTHS = (3, R, 1, 5, R, 6, 2, 4, 1, 1, R, 5, 4, 2, 3, 6)
# a second component of the reward, which leaves a completion unscored
OTHER_SCORES = (0.0, 1.0, 0.5, 0.0, 3.0, None, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, -2.0, 0.0, 1.0, 1.5)
REWARD_WEIGHTS = [1.0, 0.5]
# name: what is set; `rloo` is RLOOTrainer's, `gmpo` GMPOTrainer's, the others GRPOTrainer's
GROUP_LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.2},
    "grpo-kl": {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.2, "beta": 0.3, "use_bias_correction_kl": True},
    "grpo-k3": {"loss_type": "grpo", "epsilon": 0.2, "epsilon_high": 0.2, "beta": 0.3, "use_bias_correction_kl": False},
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon": 0.2, "epsilon_high": 0.2},
    "dapo": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
    "dapo-delta": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28, "delta": 1.5},
    "gspo": {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.15, "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.25},
    "bnpo": {"loss_type": "bnpo", "epsilon": 0.2, "epsilon_high": 0.2},
    "luspo": {"loss_type": "luspo", "epsilon": 0.1, "epsilon_high": 0.15, "importance_sampling_level": "sequence"},
    "gmpo": {"epsilon": 0.3, "epsilon_high": 0.2},
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05},
    "top-entropy": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.2, "top_entropy_quantile": 0.3},
    "entropy-bonus": {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.2, "entropy_coef": 0.5},
    "rloo": {"epsilon": 0.2, "epsilon_high": 0.2},
}


def groups() -> None:
    """Advantages and losses of GRPOTrainer and RLOOTrainer for given scores and log-probs (B is 16: 4 groups of 4).

    scores [B]; components [B, 2], of which scores are the first; advantages/{grpo, dr_grpo, rloo, gdpo} [B]; mask,
    logprobs, old_logprobs, ref_logprobs, entropies [B, R]; and for each name of GROUP_LOSSES loss/NAME [] and
    gradient/NAME [B, R], of the loss to `logprobs`, with advantages/grpo (RLOO: advantages/rloo).
    """
    generator = torch.Generator().manual_seed(0)
    shape = (len(GROUP_SCORES), R)
    mask = torch.arange(R) < torch.tensor(GROUP_LENGTHS)[:, None]
    old = torch.log_softmax(3 * torch.randn((*shape, V), generator=generator), -1)[..., 0].contiguous()
    new, reference = (old + 0.3 * torch.randn(shape, generator=generator) for _ in range(2))
    entropies = torch.rand(shape, generator=generator)
    components = np.array([*zip(GROUP_SCORES, OTHER_SCORES, strict=True)], np.float32)  # None becomes nan
    found = {"scores": torch.tensor(GROUP_SCORES), "mask": mask, "entropies": entropies}
    found["components"] = torch.tensor(components)
    found |= {"logprobs": new, "old_logprobs": old, "ref_logprobs": reference}
    gdpo = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": REWARD_WEIGHTS}
    for name, changes in {"grpo": {}, "dr_grpo": {"scale_rewards": "none"}, "rloo": {}, "gdpo": gdpo}.items():
        trainer = group_trainer(name, changes)
        prompts = [{"prompt": f"t{6 + i}"} for i in range(len(GROUP_SCORES) // GROUP) for _ in range(GROUP)]
        found[f"advantages/{name}"] = trainer._generate_and_score_completions(prompts)["advantages"]
    for name, settings in GROUP_LOSSES.items():
        trainer = group_trainer(name, settings)
        trainer.current_gradient_accumulation_steps = 1
        logprobs = new.clone().requires_grad_()
        about = (logprobs, entropies, None)  # without an auxiliary loss
        trainer._get_per_token_logps_and_entropies = lambda *_, about=about, **__: about
        ids = torch.zeros(shape, dtype=torch.long)
        inputs = {f"{part}_{what}": ids for part in ("prompt", "completion") for what in ("ids", "mask")}
        inputs |= {"completion_mask": mask.long(), "num_items_in_batch": mask.sum()}
        inputs |= {"old_per_token_logps": old, "old_logps": (old * mask).sum(1), "ref_per_token_logps": reference}
        inputs["advantages"] = found["advantages/rloo" if name == "rloo" else "advantages/grpo"]
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        found |= {f"loss/{name}": loss.detach(), f"gradient/{name}": logprobs.grad}
    save_file(
        {name: value.numpy() for name, value in found.items()},
        FIXTURES / "trl" / "groups.safetensors",
        metadata={
            "about": json.dumps(
                {"trl": trl.__version__, "group": GROUP, "weights": REWARD_WEIGHTS, "settings": GROUP_LOSSES}
            )
        },
    )


def group_trainer(name: str, settings: dict[str, Any]) -> Any:
    """The trainer of a name in GROUP_LOSSES, whose reward is GROUP_SCORES."""
    kinds = {"rloo": (RLOOTrainer, RLOOConfig), "gmpo": (GMPOTrainer, GMPOConfig)}
    trainer, config = kinds.get(name, (GRPOTrainer, GRPOConfig))
    rewards = [lambda **_: list(GROUP_SCORES), lambda **_: list(OTHER_SCORES)]
    with tempfile.TemporaryDirectory() as folder:
        return trainer(
            model=model_of("llama"),
            reward_funcs=rewards if name == "gdpo" else rewards[0],
            processing_class=tokenizer(),
            train_dataset=datasets.Dataset.from_dict({"prompt": ["t6"]}),
            args=config(
                output_dir=folder,
                per_device_train_batch_size=len(GROUP_SCORES),
                num_generations=GROUP,
                max_completion_length=R,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                **{"beta": 0.0} | settings,
            ),
        )


def main() -> None:
    """Rewrite all files."""
    shutil.rmtree(FIXTURES / "trl", ignore_errors=True)
    (FIXTURES / "trl").mkdir()
    torch.set_num_threads(1)
    functions()
    trl_losses.main()
    trl_distillation.main()
    groups()
    for name in CASES:
        found = run(name)
        logged = {key.removeprefix("metric/"): round(float(v), 4) for key, v in found.items() if "metric/" in key}
        print(name, logged, {k: v.round(3).tolist() for k, v in found.items() if "norm/" in k}, flush=True)


if __name__ == "__main__":
    main()
