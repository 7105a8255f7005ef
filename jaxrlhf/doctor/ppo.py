"""Checks of PPO with a model: a rollout of four prompts and two updates from it, in float32 and in memory only."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrlhf import memory, sharding, weights
from jaxrlhf.config import Data, PPOConfig
from jaxrlhf.data import datasets, tokenise
from jaxrlhf.data.examples import Example
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.doctor.masks import check_masks
from jaxrlhf.doctor.small_run import ROWS, small_config, with_uneven_lengths, zero_reward
from jaxrlhf.errors import quoted
from jaxrlhf.models import init
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.rollout.text import decode_completions, response_ids
from jaxrlhf.training import setup
from jaxrlhf.training.on_policy.sampler import LOWER, Sampler
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.state import State
from jaxrlhf.types import Params, Rollout

MAX_TOKENS = 16  # of a response
DRAWS = 200  # random texts that are tried as prompts
DATA_ROWS = 64  # rows of the data that are read
PROMPTS = ("the cat sat on the", "once upon a time there was", "one, two, three,", "it is a fine day, and")
TURNS = ({"role": "user", "content": "one"}, {"role": "assistant", "content": "two"})
SAMPLER_TOLERANCE = 1e-3  # difference of sampler and training log-probs
RATIO_TOLERANCE = 1e-5  # first log ratio
UPDATE_TOLERANCE = 1e-3  # relative difference of parameter changes
BYTES_PER_PARAMETER = 36  # parameter, gradient, moments, reference, recorded changes and temporaries
Outcome = tuple[bool | None, str]  # passed (None: skipped), and a message
Check = tuple[str, Callable[[], Outcome]]


def built_in_prompts(tokenizer: Tokenizer) -> Sequence[str]:
    """PROMPTS, or as many texts of random tokens if the tokenizer, that of a small vocabulary, cannot spell them."""

    def is_spelt(text: str) -> bool:
        return bool(text.strip()) and tokenizer.decode(tokenizer.encode(text)).strip() == text.strip()

    if all(map(is_spelt, PROMPTS)):
        return PROMPTS
    rng = np.random.default_rng(0)
    ordinary = sorted({*range(tokenizer.size)} - {*tokenizer.control_tokens.values()})
    drawn = (tokenizer.decode(rng.choice(ordinary, 6).tolist()) for _ in range(DRAWS)) if ordinary else ()
    spelt = [text for text in drawn if is_spelt(text)]
    return spelt[: len(PROMPTS)] if len(spelt) >= len(PROMPTS) else PROMPTS


class Trial:
    """A small PPO run of a config: its model, tokenizer, sampling and loss, on the first prompts of its data, or on
    built-in ones if it has none."""

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        self.tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
        mesh = sharding.make_mesh(config.mesh)
        self.model = setup.model_config(config.model, self.tokenizer, "lm", config.lora, mesh)
        self.stops = {*self.tokenizer.stops(config.sampling.stop_strings), *config.sampling.stop_token_ids}
        self.rows = datasets.prompts_from_texts(built_in_prompts(self.tokenizer), {}, Data(), self.tokenizer)
        self.trainer: PPOTrainer | None = None
        self.rollout: Rollout | None = None
        self.start: dict[str, Params] = {}  # trainable parameters before any update
        self.measured: list[dict[str, float]] = []  # metrics of each update
        self.changes: list[dict[str, Params]] = []  # parameter changes by each update

    def checks(self) -> Iterator[Check]:
        """Yield (name, check). Run each before asking for the next, as later checks use the results of earlier ones."""
        yield "first rows of the data", self.data
        yield "tokenizer round trip of the prompts", self.round_trip
        yield "trained sequences end with a stop token", self.template
        if message := self.too_large():
            yield "rollout and update", lambda: (None, message)
            return
        yield "rollout masks", self.masks
        if self.rollout is None:
            return
        yield "rollouts depend on the key alone", self.randomness
        yield "the reward runs", self.reward
        yield "micro-batches change nothing", self.micro_batches
        if self.measured:
            yield from self.measurements()

    def data(self) -> Outcome:
        """Read the first rows of the config's data, and check that the longest prompt and its response fit."""
        data = self.config.data
        if not data.sources:
            made = (
                "" if self.rows[0].text == PROMPTS[0] else ", made of the tokenizer's own words: it lacks common ones"
            )
            return None, f"needs a config with data.path; four built-in prompts are used instead{made}"
        part = data.sources[0]
        head = dataclasses.replace(
            part,
            max_rows=min(part.max_rows or DATA_ROWS, DATA_ROWS),
            validation_path="",
            validation_split="",
            validation_fraction=0.0,
        )
        split = datasets.prompt_rows(head, self.tokenizer)
        self.rows = [split.train[i % len(split.train)] for i in range(ROWS)]
        longest = max(len(row.tokens) for row in split.train) + self.config.sampling.response_length
        setup.check_context(longest, self.model, "the longest prompt with its response", LOWER)
        return True, f"{split.report}\nfirst prompt: {quoted(self.rows[0].text, 200)}"

    def round_trip(self) -> Outcome:
        """Encode and decode the prompts without loss."""
        for row in self.rows:
            decoded = self.tokenizer.decode(self.tokenizer.encode(row.text))
            if decoded.strip() != row.text.strip():
                return False, (
                    f"{quoted(row.text)} decodes to {quoted(decoded)}, and that is what the model sees; set "
                    "tokenizer.path to another tokenizer, or clean the data"
                )
        return True, f"{len(self.rows)} prompts, {sum(len(row.tokens) for row in self.rows)} tokens"

    def template(self) -> Outcome:
        """Check that each completion or assistant turn trained on ends with a token that stops generation."""
        chat, tokenizer = self.tokenizer.has_chat, self.tokenizer
        example = Example(None, ([*TURNS, *TURNS],)) if chat else Example(PROMPTS[0], (" two",))
        (tokens,) = tokenise.tokenise([tokenise.render(example, "sft", tokenizer)], tokenizer)
        ids, mask = tokens.sequence(0)
        ends = [token for token, now, after in zip(ids, mask, [*mask[1:], False], strict=True) if now and not after]
        unit = "assistant turn" if chat else "completion"
        for number, end in enumerate(ends, 1):
            if end not in self.stops:
                return False, (
                    f"{unit} {number} of {len(ends)} ends with {self._name(end)}, but generation stops at "
                    f"{', '.join(map(self._name, sorted(self.stops)))}: a model trained on it would not stop. End "
                    "turns with a control token (set your own template in tokenizer.chat_template), or list the id in "
                    "sampling.stop_token_ids"
                )
        return bool(ends), f"a trained {unit} ends with {', '.join(dict.fromkeys(map(self._name, ends))) or 'nothing'}"

    def too_large(self) -> str:
        """Message if memory is too small for the rollout and the updates, else ""."""
        count = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init(self.model, jax.random.key(0)))))
        roles = 2 if self.config.critic.trunk == "own" else 1
        needed, free = BYTES_PER_PARAMETER * roles * count, memory.free_on_device()
        if free is None or needed <= free:
            return ""
        return (
            f"policy{' and critic' * (roles - 1)} of {count / 1e6:,.0f} M parameters need {needed / 2**30:.1f} GiB for "
            f"an update in float32, but {free / 2**30:.1f} are free"
        )

    def masks(self) -> Outcome:
        """Compare the masks of a rollout with its lengths: stop tokens count, padding does not."""
        self.trainer = trainer = PPOTrainer(small_config(self.config, self._response_length()), reward=zero_reward)
        rollout, stops, note = trainer.generate(self.rows, 0)[0], self.stops, ""
        self.rollout = rollout
        if not np.any(rollout.finished):  # generate it again with one of its tokens as a stop token
            ids = response_ids(rollout)[0]
            end = ids[len(ids) // 2]
            stops, note = {*stops, end}, f"; no response ended, so {self._name(end)} was used as a stop token"
            sampling = dataclasses.replace(trainer.config.sampling, stop_token_ids=tuple(stops))
            config = dataclasses.replace(trainer.config, sampling=sampling)
            sampler = Sampler(config, trainer.model, self.tokenizer, trainer.mesh, 0)
            rollout = sampler.generate(trainer.params, self.rows, trainer.key(0, 0))[0]
        mistake, drawing = check_masks(jax.device_get(rollout), self.rows, stops, self.tokenizer)
        return not mistake, "\n".join([mistake or f"correct in {ROWS} rows{note}; one of them:", *drawing])

    def randomness(self) -> Outcome:
        """Check that a rollout is repeated with the same key and changes with the key of the next update."""
        assert self.trainer is not None and self.rollout is not None
        first, again, other = (
            response_ids(r) for r in (self.rollout, *(self.trainer.generate(self.rows, step)[0] for step in (0, 1)))
        )
        if first != again:
            return False, "the same key has drawn other tokens: runs cannot be repeated, nor resumed bit for bit"
        changed = sum(a != b for a, b in zip(first, other, strict=True))
        if not changed:
            return False, (
                "the key of the next update has drawn the same tokens in every row: it is not used, or sampling is too "
                f"narrow (raise sampling.temperature, now {self.config.sampling.temperature:g}, or relax the filters)"
            )
        return True, f"the next update's key changes {changed} of {ROWS} responses, the same key none"

    def reward(self) -> Outcome:
        """Score two responses with the config's reward."""
        source, rollout = self.config.reward, self.rollout
        automatic = dataclasses.replace(source, components=tuple(part for part in source.components if not part.human))
        if not automatic.parts():
            return None, "a person scores the completions" if source.parts() else "needs a config with a reward"
        scorer, rows = Scorer(automatic, self.tokenizer), self.rows[:2]
        assert rollout is not None
        rollout, texts = decode_completions(
            jax.tree.map(lambda x: x[:2], rollout), self.tokenizer, self.config.sampling.stop_strings
        )
        scores = scorer.score_rows(rows, texts, rollout).as_list()
        shown = ["unscored" if score is None else f"{score:.4g}" for score in scores]
        lines = [f"{score} for {quoted(text)}" for score, text in zip(shown, texts, strict=True)]
        return None if shown == ["unscored"] * 2 else True, "\n".join(["scores of two completions", *lines])

    def micro_batches(self) -> Outcome:
        """Compare an update in micro-batches of one row with one of the full batch."""
        self.learn(None)
        self.learn(1)
        if any(m["skipped_updates"] for m in self.measured):
            return False, (
                "the loss or a gradient was not finite, so the update was skipped; check the weights of the model and "
                "the scale of the ppo options"
            )
        differences, passed = [], True
        for role in ("policy", "critic"):
            full, micro = (change[role] for change in self.changes)
            size = float(optax.tree.norm(full))
            relative = float(optax.tree.norm(jax.tree.map(np.subtract, full, micro))) / max(size, 1e-30)
            passed &= size > 0 and relative <= UPDATE_TOLERANCE
            differences.append(f"{role} {relative:.1e}" if size else f"{role} has not changed")
        return passed, (
            f"relative difference of the parameter changes, one row at a time and all {ROWS}: {', '.join(differences)}"
            f"{'' if passed else f'; above {UPDATE_TOLERANCE:g} it is not rounding, please report it as a bug'}"
        )

    def learn(self, micro: int | None) -> None:
        """Run one update from the initial parameters, in micro-batches of `micro` rows (None: the full batch)."""
        assert self.trainer is not None and self.rollout is not None
        trainer, rollout = self.trainer, with_uneven_lengths(self.rollout, self.tokenizer.pad_id)
        spec, ppo, state = trainer.spec, trainer.config.ppo, trainer.state.value
        start = self.start = self.start or jax.tree.map(np.array, state.params)
        fresh = jax.tree.map(lambda x: jnp.array(x, copy=True), start)
        optimizers = dict(spec.optimizers)
        trainer.state = State(fresh, optimizers, spec.mesh, ppo.kl_coef, score_stats=state.score_stats)
        trainer.spec = dataclasses.replace(spec, ppo=dataclasses.replace(ppo, micro_batch_size=micro))
        experience, metrics = trainer.learn(rollout, np.linspace(-1, 1, ROWS), 0)
        divergence = jnp.max(jnp.abs(experience.old_logprobs - experience.ref_logprobs))
        self.measured.append({k: float(v) for k, v in (metrics | {"divergence": divergence}).items()})
        new = trainer.state.value.params
        self.changes.append(jax.tree.map(lambda x, old: np.asarray(x) - np.asarray(old), new, start))

    def measurements(self) -> Iterator[Check]:
        """Checks that a metric is at most `tolerance` in all updates; otherwise they name the likely cause."""
        equal = RATIO_TOLERANCE if self.config.lora.use_dora else 0  # DoRA divides magnitudes by a norm
        for name, key, tolerance, quantity, cause in (
            (
                "KL to the reference is zero",
                "divergence",
                equal,
                "largest |log pi - log ref| before the first step",
                "policy and reference are not scored alike (temperature, mask or weights)",
            ),
            (
                "first ratio is one",
                "val/first_log_ratio_max",
                RATIO_TOLERANCE,
                "largest |log pi - log pi_old| at the first step",
                "annotation and update score the policy differently",
            ),
            (  # the sampler decodes token by token with a cache
                "sampler and training log-probs agree",
                "val/sampler_logprob_gap_max",
                SAMPLER_TOLERANCE,
                f"largest difference at temperature {self.config.sampling.temperature:g}",
                "sampling and training differ (other temperature, filters, mask or weights)",
            ),
        ):
            value = max(metrics[key] for metrics in self.measured)
            excess = "" if value <= tolerance else f", above {tolerance:g}: {cause}; please report it as a bug"
            yield name, lambda outcome=(not excess, f"{quantity} {value:.1e}{excess}"): outcome

    def _response_length(self) -> int:
        free = self.model.max_positions - max(len(row.tokens) for row in self.rows)
        return max(1, min(MAX_TOKENS, self.config.sampling.response_length, free))

    def _name(self, token: int) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens([token])[0]!r} (id {token})"
