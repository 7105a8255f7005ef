"""Does PPO do with a model what it should: a rollout of four prompts and updates from it, in float32, nothing kept."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import memory, weights
from jaxrlhf.config import Data, Generation, Mesh, Optim, PPOConfig, Reference, RewardSource, Scores, Validation
from jaxrlhf.data import datasets
from jaxrlhf.data import tokenise as sequences
from jaxrlhf.data.examples import Example
from jaxrlhf.doctor.masks import audit
from jaxrlhf.errors import quoted
from jaxrlhf.models import init
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.rollout.text import decode_completions, response_ids
from jaxrlhf.training import setup
from jaxrlhf.training.on_policy.sampler import LOWER, Sampler
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.ppo.update import annotate, update
from jaxrlhf.training.state import State
from jaxrlhf.types import Params, Rollout

ROWS, TOKENS, FIRST = 4, 16, 64  # prompts, most tokens of a response, rows of the data that are read
PROMPTS = ("the cat sat on the", "once upon a time there was", "one, two, three,", "it is a fine day, and")
TURNS = ({"role": "user", "content": "one"}, {"role": "assistant", "content": "two"})
SAMPLED, RATIO, CHANGE = 1e-3, 1e-5, 1e-3  # bounds: sampled log-probs, first log ratio, relative difference of updates
BYTES = 36  # for each parameter that trains: itself, gradient, moments, reference, changes and what is in passing
Outcome = tuple[bool | None, str]  # passed, or None for "not done"; what was found
Check = tuple[str, Callable[[], Outcome]]


class Trial:
    """The PPO run of a config, small: its model, tokenizer, sampling and loss on the first prompts of its data, or on
    four of our own."""

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
        self.model = setup.model_config(config.model, self.tokenizer, "lm", config.lora)
        self.stops = {*self.tokenizer.stop_ids, *config.sampling.stop_token_ids}
        self.rows = datasets.prompts_from_texts(PROMPTS, {}, Data(), self.tokenizer)
        self.trainer: PPOTrainer | None = None
        self.rollout: Rollout | None = None
        self.start: dict[str, Params] = {}  # what trains, before any update
        self.measured: list[dict[str, float]] = []  # of the update in one piece, and in micro-batches of one row
        self.changes: list[dict[str, Params]] = []

    def checks(self) -> Iterator[Check]:
        """Name and check, each to be run before the next is asked for: the later ones look at what the earlier left."""
        yield "first rows of the data", self.data
        yield "prompts come back from tokens", self.round_trip
        yield "training ends where generation stops", self.template
        if trouble := self.too_large():
            yield "rollout and update", lambda: (None, trouble)
            return
        yield "masks", self.masks
        if self.rollout is None:
            return
        yield "two rollouts differ, one seed repeats", self.randomness
        yield "the reward runs", self.reward
        yield "micro-batches change nothing", self.micro_batches
        if self.measured:
            yield "KL to the reference is zero", self.divergence
            yield "first ratio is one", self.first_ratio
            yield "log-probs are those of sampling", self.sampled

    def data(self) -> Outcome:
        """The first rows of the config's data can be used, and there is room for the longest with its response."""
        data = self.config.data
        if not data.path:
            return None, "needs a config with data.path; four prompts of our own stand in"
        rows = min(data.max_rows or FIRST, FIRST)
        part = dataclasses.replace(data, max_rows=rows, validation_path="", validation_fraction=0.0)
        split = datasets.prompt_rows(part, self.tokenizer)
        self.rows = [split.train[i % len(split.train)] for i in range(ROWS)]
        longest = max(len(row.tokens) for row in split.train) + self.config.sampling.response_length
        setup.check_context([longest], self.model, "the longest prompt with its response", LOWER)
        return True, f"{split.report}\nfirst prompt: {quoted(self.rows[0].text, 200)}"

    def round_trip(self) -> Outcome:
        """What people wrote in the prompts is what the tokens say."""
        for row in self.rows:
            back = self.tokenizer.decode(self.tokenizer.encode(row.text))
            if back.strip() != row.text.strip():
                return False, (
                    f"{quoted(row.text)} comes back as {quoted(back)}, and so the model reads it; "
                    "set tokenizer.path to another tokenizer, or clean the data"
                )
        return True, f"{len(self.rows)} prompts, {sum(len(row.tokens) for row in self.rows)} tokens"

    def template(self) -> Outcome:
        """Every answer that training learns ends with a token that ends a response."""
        chat, tokenizer = self.tokenizer.has_chat, self.tokenizer
        example = Example(None, ([*TURNS, *TURNS],)) if chat else Example(PROMPTS[0], (" two",))
        (tokens,) = sequences.tokenise([sequences.render(example, "sft", tokenizer)], tokenizer)
        ids, learnt = tokens.sequence(0)
        ends = [i for i, now, after in zip(ids, learnt, [*learnt[1:], False], strict=True) if now and not after]
        what = "assistant turn" if chat else "completion"
        for number, end in enumerate(ends, 1):
            if end not in self.stops:
                return False, (
                    f"{what} {number} of {len(ends)} ends with {self._name(end)}, and generation stops at "
                    f"{', '.join(map(self._name, sorted(self.stops)))}: a model trained on it would run on. End turns "
                    "with a control token (a template of your own in tokenizer.chat_template), or list the id in "
                    "sampling.stop_token_ids"
                )
        return bool(ends), f"a learnt {what} ends with {', '.join(dict.fromkeys(map(self._name, ends))) or 'nothing'}"

    def too_large(self) -> str:
        """Why there is no room for the trial, or ""."""
        count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init(self.model, jax.random.key(0)))))
        roles = 2 if self.config.critic.trunk == "own" else 1
        need, free = BYTES * roles * count, memory.free_on_device()
        if free is None or need <= free:
            return ""
        return (
            f"policy{' and critic' * (roles - 1)} of {count / 1e6:,.0f} M parameters would train here in "
            f"{need / 2**30:.1f} GiB, float32 with moments; {free / 2**30:.1f} are free"
        )

    def masks(self) -> Outcome:
        """The masks of a rollout are those of its lengths: end tokens count, padding does not."""
        self.trainer = trainer = PPOTrainer(_small(self.config, self._room()), reward=_nothing)
        rollout, stops, note = trainer.generate(self.rows, 0)[0], self.stops, ""
        self.rollout = rollout
        if not np.any(rollout.finished):  # the same draw once more, and now one of its tokens ends it
            ids = response_ids(rollout)[0]
            end = ids[len(ids) // 2]
            stops, note = {*stops, end}, f"; no response ended by itself, so {self._name(end)} plays an end token"
            sampling = dataclasses.replace(trainer.config.sampling, stop_token_ids=tuple(stops))
            engine = trainer.config.rollout
            sampler = Sampler(sampling, engine, trainer.model, self.tokenizer, trainer.mesh, 0, ROWS)
            rollout = sampler.generate(trainer.params, self.rows, trainer.online.key(0, 0))[0]
        wrong, lines = audit(jax.device_get(rollout), self.rows, stops, self.tokenizer)
        return not wrong, "\n".join([wrong or f"as the lengths say, in {ROWS} rows; one of them{note}", *lines])

    def randomness(self) -> Outcome:
        """The key of an update decides what is drawn, and nothing else does."""
        assert self.trainer is not None and self.rollout is not None
        first, again, other = (
            response_ids(r) for r in (self.rollout, *(self.trainer.generate(self.rows, step)[0] for step in (0, 1)))
        )
        if first != again:
            return False, "the same key has drawn other tokens: runs could not be repeated, nor resumed bit for bit"
        changed = sum(a != b for a, b in zip(first, other, strict=True))
        if not changed:
            return False, (
                "the key of the next update has drawn the same tokens in every row: it is not used, or sampling "
                f"(temperature {self.config.sampling.temperature:g}) leaves no choice"
            )
        return True, f"the next update's key changes {changed} of {ROWS} responses, the same key none"

    def reward(self) -> Outcome:
        """The config's reward answers for two responses."""
        whole, rollout = self.config.reward, self.rollout
        source = dataclasses.replace(whole, components=tuple(part for part in whole.components if not part.human))
        if not source.parts():
            return None, "a person judges" if whole.parts() else "needs a config with a reward"
        scorer, rows = Scorer(source, self.tokenizer), self.rows[:2]
        assert rollout is not None
        two, texts = decode_completions(
            jax.tree.map(lambda x: x[:2], rollout), self.tokenizer, self.config.sampling.stop_strings
        )
        asked = [row.text for row in rows], texts, two, datasets.columns(rows)
        scores = scorer.score(*asked, messages=[row.messages for row in rows]).totals
        return bool(np.all(np.isfinite(scores))), "\n".join(
            ["two responses", *(f"{s:.4g} for {quoted(t)}" for s, t in zip(scores, texts, strict=True))]
        )

    def micro_batches(self) -> Outcome:
        """An update in micro-batches of one row moves the parameters as the update in one piece does."""
        self.learn(None)
        self.learn(1)
        if any(m["skipped_updates"] for m in self.measured):
            return False, "the loss or a gradient was not finite, and the update was skipped"
        found, passed = [], True
        for role in ("policy", "critic"):
            whole, parts = (jax.tree.leaves(change[role]) for change in self.changes)
            size = _norm(whole)
            relative = _norm([a - b for a, b in zip(whole, parts, strict=True)]) / max(size, 1e-30)
            passed &= size > 0 and relative <= CHANGE
            found.append(f"{role} {relative:.1e}" if size else f"{role} has not moved")
        return passed, (
            f"relative difference of the change by one row at a time and by all {ROWS}: {', '.join(found)}"
            f"{'' if passed else f', and {CHANGE:g} is rounding'}"
        )

    def learn(self, micro: int | None) -> None:
        """An update from the policy and the critic as they were before any, in micro-batches of `micro` rows."""
        assert self.trainer is not None and self.rollout is not None
        trainer, rollout = self.trainer, _ragged(self.rollout, self.tokenizer.pad_id)
        roles = trainer.roles
        start = self.start = self.start or jax.tree.map(np.array, trainer.state.value.params)
        fresh = jax.tree.map(lambda x: jnp.array(x, copy=True), start)
        trainer.state = State(fresh, dict(roles.optimizers), roles.mesh, roles.ppo.kl_coef)
        state = trainer.state.value
        roles = dataclasses.replace(roles, ppo=dataclasses.replace(roles.ppo, micro_batch_size=micro))
        experience, before = annotate(state, trainer.frozen, rollout, jnp.linspace(-1, 1, ROWS), roles=roles)
        apart = jnp.max(jnp.abs(experience.old_logprobs - experience.ref_logprobs))
        trainer.state.value, after = update(state, trainer.frozen, experience, jax.random.key(0), roles=roles)
        self.measured.append({k: float(v) for k, v in (before | after | {"apart": apart}).items()})
        new = trainer.state.value.params
        self.changes.append(jax.tree.map(lambda x, old: np.asarray(x) - np.asarray(old), new, start))

    def divergence(self) -> Outcome:
        """Before the first step the policy is its reference, bit for bit; with DoRA, whose magnitudes are divided by a
        norm, to rounding."""
        apart = max(m["apart"] for m in self.measured)
        same = apart <= (RATIO if self.config.lora.use_dora else 0)
        return same, f"largest |log pi - log ref| before the first step {apart:.1e}" + (
            "" if same else ": policy and reference are not scored alike (temperature, mask or weights)"
        )

    def first_ratio(self) -> Outcome:
        """The first mini-batch meets the policy that was annotated."""
        first = max(m["val/first_log_ratio_max"] for m in self.measured)
        return first <= RATIO, f"largest |log pi - log pi_old| at the first step {first:.1e}" + (
            "" if first <= RATIO else f", and {RATIO:g} is rounding: annotation and update score the policy differently"
        )

    def sampled(self) -> Outcome:
        """Log-probs of the sampler, with a cache and token by token, are those that training works with."""
        gap = max(m["val/sampler_logprob_gap_max"] for m in self.measured)
        return gap <= SAMPLED, f"largest difference {gap:.1e} at temperature {self.config.sampling.temperature:g}" + (
            "" if gap <= SAMPLED else f", and {SAMPLED:g} is rounding: other temperature, filters, mask or weights"
        )

    def _room(self) -> int:
        """Response tokens of the trial."""
        left = self.model.max_positions - max(len(row.tokens) for row in self.rows)
        return max(1, min(TOKENS, self.config.sampling.response_length, left))

    def _name(self, token: int) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens([token])[0]!r} (id {token})"


def _small(config: PPOConfig, length: int) -> PPOConfig:
    """`config` on one device in float32, with one small batch; what would need more updates, or a disk, left out."""
    sampling, ppo = config.sampling, config.ppo
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, param_dtype="float32", compute_dtype="float32", merged_path=""),
        sampling=dataclasses.replace(
            sampling, response_length=length, min_length=min(sampling.min_length, length), stop_strings=()
        ),
        ppo=dataclasses.replace(
            ppo, batch_size=ROWS, total_episodes=ROWS, num_train_epochs=None, num_ppo_epochs=2, num_mini_batches=1,
            micro_batch_size=None, local_rollout_forward_batch_size=None, replay=0, target_kl=None,
        ),
        # a large eps: Adam magnifies the rounding of a gradient near zero by learning_rate / eps
        optim=Optim(learning_rate=1e-3, schedule="constant", eps=1e-3),
        critic=dataclasses.replace(config.critic, init="policy", warmup_updates=0, learning_rate=None),
        data=Data(), reward=RewardSource(), scores=Scores(), reference=Reference(), rollout=Generation(),
        validation=Validation(), mesh=Mesh(),
    )  # fmt: skip


def _nothing(completions: Sequence[str]) -> list[float]:
    """Stands in for the reward: the trial gives scores of its own."""
    return [0.0] * len(completions)


def _ragged(rollout: Rollout, pad: int) -> Rollout:
    """The rollout with row i cut to the share (i + 1) / ROWS of its columns: over rows of one length, a mean of means
    would be the mean."""
    columns = rollout.response_mask.shape[1]
    room = np.maximum(columns * np.arange(1, ROWS + 1) // ROWS, 1)
    kept = np.asarray(rollout.response_mask) & (np.arange(columns) < room[:, None])
    mask = np.concatenate([np.asarray(rollout.mask)[:, :-columns], kept], axis=1)
    prompt = np.arange(mask.shape[1]) < mask.shape[1] - columns
    return dataclasses.replace(
        rollout,
        tokens=jnp.asarray(np.where(mask | prompt, rollout.tokens, pad)),
        mask=jnp.asarray(mask),
        response_mask=jnp.asarray(kept),
        logprobs=jnp.where(kept, rollout.logprobs, 0.0),
        finished=rollout.finished & jnp.asarray((kept == np.asarray(rollout.response_mask)).all(1)),
        support=None if rollout.support is None else jnp.where(kept[..., None], rollout.support, jnp.uint8(0)),
    )


def _norm(leaves: Sequence[Any]) -> float:
    return float(np.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in leaves)))
