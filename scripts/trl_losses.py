"""Record TRL's preference losses on one random batch in tests/fixtures/trl/losses.safetensors.

Called by make_trl_fixtures.py, or directly: python scripts/trl_losses.py. The methods of TRL's trainers run on a
stand-in for the trainer; B pairs, log-probs of whole responses:

    chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens    [B]
    scores                      [2, B]     of a reward model, (chosen, rejected)
    margins, kl_logprobs, ref_kl_logprobs    [B]
    tokens, mask [2 B, T], logits [2 B, T, V]      of the policy
    running_means               [3]        of BCO's statistics, after each 3 of kl_logprobs
    loss/CASE                   []
    token-gradient/CASE         [2 B, T - 1]    by the log-probs of tokens
    gradient/CASE               [2, B]     by the log-probs, or scores, of (chosen, rejected)
    metric/CASE/NAME            []         as TRL logs it

The settings of each case are JSON under `about` in the metadata. KTO gets the chosen responses of the first half of the
pairs and the rejected ones of the rest, as unpaired rows.
"""

import collections
import json
import pathlib
import types
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import trl  # pyright: ignore[reportMissingImports]
from safetensors.numpy import save_file
from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments  # pyright: ignore[reportMissingImports]
from trl.experimental.cpo import CPOTrainer  # pyright: ignore[reportMissingImports]
from trl.experimental.orpo import ORPOTrainer  # pyright: ignore[reportMissingImports]
from trl.trainer import dpo_trainer, kto_trainer, reward_trainer  # pyright: ignore[reportMissingImports]
from trl.trainer.sft_trainer import dft_loss  # pyright: ignore[reportMissingImports]

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "tests" / "fixtures"
B, T, V = 8, 8, 9
BETA, GAMMA, TAU = 0.3, 0.4, 0.05
METRICS = ("rewards/", "logps/", "kl", "log_odds", "accuracy", "margin", "mean_reward")
DPO_CASES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("sigmoid", "hinge", "ipo", "nca_pair", "sppo_hard", "aot", "aot_unpaired")},
    **{name: {} for name in ("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm", "bco_pair")},
    "sigmoid-wpo": {"use_weighting": True},
    "sigmoid-ld": {"ld_alpha": 0.4},
    "sigmoid-several": {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    **{f"{name}-smooth": {"label_smoothing": 0.2} for name in ("sigmoid", "robust", "exo_pair", "aot")},
    **{f"sigmoid-{name}": {"f_divergence_type": name} for name in ("forward_kl", "js_divergence")},
    "discopop-far": {},  # with chosen responses of almost zero probability
    "sigmoid-alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
}
BY_TOKEN = ("sft", "sigmoid-ld")  # the gradient differs between the tokens of a response; that of sft is not recorded
BASELINE = 0.15
CPO_CASES: dict[str, dict[str, Any]] = {
    "cpo": {"loss_type": "sigmoid"},
    "cpo-smooth": {"loss_type": "sigmoid", "label_smoothing": 0.2},
    "simpo": {"loss_type": "simpo"},
}
KTO_CASES: dict[str, dict[str, Any]] = {
    "kto": {"loss_type": "kto", "desirable_weight": 1.5, "undesirable_weight": 0.7},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "desirable_weight": 1.0, "undesirable_weight": 1.0},
}


def trainer(**settings: Any) -> Any:
    """Stand-in with the trainer attributes that the methods read."""
    accelerator = types.SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    fixed = {"model": types.SimpleNamespace(training=False), "accelerator": accelerator, "aux_loss_enabled": False}
    fixed |= {"beta": BETA, "label_smoothing": 0.0, "_metrics": {"eval": collections.defaultdict(list)}}
    return types.SimpleNamespace(**fixed | {"_total_train_tokens": 0} | settings)


def watched(module: Any, seen: list[torch.Tensor]) -> None:
    """Make `module` record the log-probs of its tokens, so that their gradient can be computed."""
    plain = module.selective_log_softmax

    def selective_log_softmax(logits: Any, labels: Any) -> Any:
        seen.append(plain(logits, labels))
        seen[-1].retain_grad()
        return seen[-1].clone()  # the trainers write into it

    module.selective_log_softmax = selective_log_softmax


class Batch:
    """One response per row, [2 B, T], chosen ones first: the token 0 is a prompt, the rest a response and padding."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, V, (2 * B, T), generator=generator)
        self.lengths = torch.randint(1, T, (2 * B,), generator=generator)
        columns = torch.arange(T)[None]
        self.mask = ((columns > 0) & (columns <= self.lengths[:, None])).long()
        self.logits = torch.randn((2 * B, T, V), generator=generator, requires_grad=True)
        logprobs = torch.log_softmax(self.logits.detach(), -1)[:, :-1]
        taken = logprobs.gather(-1, self.tokens[:, 1:, None])[..., 0]
        self.logprobs = (taken * self.mask[:, 1:]).sum(1)
        self.ref = (self.logprobs + 3 * torch.randn(2 * B, generator=generator)).clamp(max=-0.1)
        self.kl, self.ref_kl = torch.randn((2, B), generator=generator) - torch.tensor([[10.0], [12.0]])
        self.margins = torch.rand(B, generator=generator)
        self.scores = torch.randn((2 * B, 1), generator=generator, requires_grad=True)

    def inputs(self, rows: torch.Tensor) -> dict[str, Any]:
        names = {"input_ids": self.tokens, "attention_mask": self.mask, "completion_mask": self.mask}
        return {name: values[rows] for name, values in names.items()}

    def gradient(self, seen: torch.Tensor) -> np.ndarray:
        """Gradient [B or 2 B] by the sum over a row, which equals that of its first token, always a real one."""
        assert seen.grad is not None
        return seen.grad[:, 0].numpy()


def main() -> None:
    """Rewrite the file."""
    batch, found, about = Batch(), {}, {}
    seen: list[torch.Tensor] = []
    watched(dpo_trainer, seen)
    watched(kto_trainer, seen)
    everything = torch.arange(2 * B)

    def model(**inputs: Any) -> Any:
        rows = everything if len(inputs["input_ids"]) == 2 * B else unpaired
        return types.SimpleNamespace(logits=batch.logits[rows])

    def record(name: str, stub: Any, loss: torch.Tensor, gradient: np.ndarray | None, settings: dict[str, Any]) -> None:
        found[f"loss/{name}"] = loss.detach().numpy()
        if gradient is not None:
            found[f"gradient/{name}"] = gradient.reshape(2, B)
        for key, values in stub._metrics["eval"].items():
            if key.startswith(METRICS):
                found[f"metric/{name}/{key}"] = np.array(values[-1], np.float32)
        about[name] = settings

    for name, changes in DPO_CASES.items():
        settings = {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5} | changes
        plain = {"ld_alpha": None, "use_weighting": False, "loss_types": [name.split("-")[0]], "loss_weights": [1.0]}
        stub = trainer(precompute_ref_logps=True, args=types.SimpleNamespace(discopop_tau=TAU), **plain | settings)
        inputs = batch.inputs(everything) | {"ref_chosen_logps": batch.ref[:B], "ref_rejected_logps": batch.ref[B:]}
        if name == "discopop-far":
            inputs["ref_chosen_logps"] = batch.ref[:B] + 1000
        loss = dpo_trainer.DPOTrainer._compute_loss(stub, model, inputs, False)
        loss.backward()
        record(name, stub, loss, None if name in BY_TOKEN else batch.gradient(seen[-1]), changes)
        if name in BY_TOKEN and name != "sft":
            found[f"token-gradient/{name}"] = seen[-1].grad.numpy()

    stub = trainer(running=types.SimpleNamespace(mean=BASELINE), match_underlying_distribution=False)
    logprobs = batch.logprobs.clone().requires_grad_()
    sides = logprobs[:B], logprobs[B:], batch.ref[:B], batch.ref[B:], None, None
    loss = BCOTrainer.bco_loss(stub, *sides, do_train=False)[0].mean()
    record("bco", stub, loss, torch.autograd.grad(loss, logprobs)[0].numpy(), {"baseline": BASELINE})
    moments = RunningMoments(types.SimpleNamespace(use_distributed=False))
    means = [moments.mean for part in batch.kl.split(3) if moments.update(part)]
    found["running_means"] = np.array(means, np.float32)

    labels = torch.where(batch.mask.bool(), batch.tokens, -100)
    loss = dft_loss(types.SimpleNamespace(logits=batch.logits), labels)
    found["loss/dft"] = loss.detach().numpy()
    found["gradient/dft-logits"] = torch.autograd.grad(loss, batch.logits)[0].numpy()

    logprobs = batch.logprobs.clone().requires_grad_()
    for name, settings in CPO_CASES.items():
        stub = trainer(alpha=0.0, simpo_gamma=GAMMA, **settings)
        given = logprobs / batch.lengths if name == "simpo" else logprobs
        loss = CPOTrainer.cpo_loss(stub, given[:B], given[B:])[0].mean()
        record(name, stub, loss, torch.autograd.grad(loss, logprobs)[0].numpy(), settings)
    stub = trainer()
    given = logprobs / batch.lengths
    losses, _, _, log_odds_ratio, log_odds_chosen = ORPOTrainer.odds_ratio_loss(stub, given[:B], given[B:])
    stub._metrics["eval"] |= {"log_odds_ratio": [log_odds_ratio.item()], "log_odds_chosen": [log_odds_chosen.item()]}
    loss = -losses.mean()
    record("orpo", stub, loss, torch.autograd.grad(loss, logprobs)[0].numpy(), {})

    unpaired = torch.cat([everything[: B // 2], everything[B + B // 2 :]])
    for name, settings in KTO_CASES.items():
        stub = trainer(calculate_KL=name == "kto", precompute_ref_logps=True, **settings)
        stub._compute_kl_logps = lambda _model, _batch: batch.kl
        more = {"label": [True] * (B // 2) + [False] * (B // 2), "ref_logps": batch.ref[unpaired]}
        loss = kto_trainer.KTOTrainer._compute_loss(
            stub, model, batch.inputs(unpaired) | more | {"ref_KL_logps": batch.ref_kl}, False
        )
        loss.backward()
        gradient = np.zeros(2 * B, np.float32)
        gradient[unpaired.numpy()] = batch.gradient(seen[-1])
        record(name, stub, loss, gradient, settings)

    for name, centre in (("reward", None), ("reward-centred", 0.1)):
        stub = trainer(args=types.SimpleNamespace(center_rewards_coefficient=centre))
        loss = reward_trainer.RewardTrainer.compute_loss(
            stub, lambda **_: types.SimpleNamespace(logits=batch.scores), {"margin": batch.margins}
        )
        gradient = torch.autograd.grad(loss, batch.scores)[0].numpy()
        record(name, stub, loss, gradient, {"center_rewards_coefficient": centre})

    arrays = {"scores": batch.scores.detach().reshape(2, B), "margins": batch.margins}
    arrays |= {"logits": batch.logits.detach(), "tokens": batch.tokens.int(), "mask": batch.mask.bool()}
    arrays |= {"kl_logprobs": batch.kl, "ref_kl_logprobs": batch.ref_kl}
    for side, rows in (("chosen", slice(B)), ("rejected", slice(B, None))):
        arrays |= {side: batch.logprobs[rows], f"ref_{side}": batch.ref[rows]}
        arrays[f"{side}_tokens"] = batch.lengths[rows].int()
    found |= {name: values.numpy() for name, values in arrays.items()}
    fixed = {"trl": trl.__version__, "beta": BETA, "simpo_gamma": GAMMA, "discopop_tau": TAU, "cases": about}
    found = {name: np.array(values, order="C") for name, values in found.items()}
    save_file(found, FIXTURES / "trl" / "losses.safetensors", metadata={"about": json.dumps(fixed)})


if __name__ == "__main__":
    main()
