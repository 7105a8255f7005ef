"""What learns in a group-relative run: a policy, and a reference if there is a KL to it. No critic."""

import dataclasses
from concurrent.futures import Future

import jax
import numpy as np
from jax import Array

from jaxrlhf import compilation, sharding
from jaxrlhf.algorithms.scores import no_stats
from jaxrlhf.config import GRPOConfig
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError
from jaxrlhf.training import setup
from jaxrlhf.training.grpo.update import Roles, annotate, update
from jaxrlhf.training.on_policy.learner import shaped_scores, without_moments
from jaxrlhf.training.on_policy.policy import policy_params, reference_dtype, reference_params
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.ppo.replay import widened
from jaxrlhf.training.state import State
from jaxrlhf.training.step import Metrics
from jaxrlhf.types import GroupExperience, Params, Rollout


class Learner:
    """Learns from the scored rollouts of `sampler` for `updates` updates, starting from `policy`, which it takes over;
    with adapters, what is under them is the reference.

    With `abstract`, parameters are shapes, and nothing can be learnt.
    """

    def __init__(
        self, config: GRPOConfig, sampler: Sampler, policy: Params, updates: int, lora_key: Array, *, abstract: bool
    ) -> None:
        self.config, self.sampler, self.mesh = config, sampler, sampler.mesh
        grpo, model = config.grpo, sampler.model

        def begin(policy: Params) -> tuple[Params, Params, Params | None, Params | None]:
            """(what trains, what is under it, the reference, what of that moves) at step 0."""
            trained, base = setup.split_trainable(
                setup.add_adapters(policy, model, config.lora, lora_key), config.lora.enabled
            )
            if not grpo.has_reference:
                return trained, base, None, None
            reference = base or setup.cast_copy(policy, reference_dtype(config.reference, model), self.mesh)
            if not config.reference.sync_every:
                return trained, base, reference, None
            return trained, base, base, setup.cast_copy(trained, "float32", self.mesh) if base else reference

        made = setup.abstract_call(begin, self.mesh, policy) if abstract else begin(policy)
        trained, base, reference, moving = made
        self.frozen = {"policy": base} if reference is None else {"policy": base, "reference": reference}
        self.identity = "" if abstract else setup.params_fingerprint(base or {**(reference or {}), **(moving or {})})
        if config.reference.offload and not abstract:
            self.frozen["reference"] = sharding.to_host(reference)
        steps = updates * grpo.num_iterations * grpo.num_mini_batches
        optimizers = {"policy": make_optimizer(config.optim, config.optim.learning_rate, steps)}
        self.roles = Roles(
            policy=model,
            optimizers=tuple(optimizers.items()),
            grpo=grpo,
            response_length=config.sampling.response_length,
            temperature=config.sampling.temperature,
            mesh=self.mesh,
            sync_every=config.reference.sync_every,
            sync_alpha=config.reference.sync_alpha,
            rejected=rejected_tokens(config, sampler.tokenizer),
        )
        self.state = State(
            {"policy": trained},
            optimizers,
            self.mesh,
            grpo.kl_weight,
            config.optim.offload,
            score_stats=sharding.put_whole(no_stats(), self.mesh),
            reference=moving,
        )

    @property
    def policy(self) -> Params:
        """The policy's parameters as they are now, adapters and what is under them."""
        return policy_params(self.state.value.params, self.frozen)

    @property
    def reference(self) -> Params | None:
        """The reference's parameters as they are now, on the device; None where there is none."""
        if not self.config.grpo.has_reference:
            return None
        return sharding.to_device(reference_params(self.state.value, self.frozen))

    def learn(
        self, rollout: Rollout, scores: np.ndarray, greedy: tuple[Rollout, np.ndarray] | None, key: Array
    ) -> tuple[GroupExperience, Metrics]:
        """Shape the scores, compare the rollout's responses, and make the update's optimizer steps; moves `state` on.

        `greedy` is the greedy response to each row's prompt and its score, for remax.
        """
        config, state, ahead = self.config, without_moments(self.state.value), self.sampler.programs
        length = config.sampling.response_length
        columns = rollout.response_mask.shape[1]
        if columns < len(self.roles.rejected):
            room = rollout.tokens.shape[1] - columns, len(self.roles.rejected)
            rollout, _ = widened(rollout, None, room, self.sampler.tokenizer.pad_id, self.mesh)
        if rollout.response_mask.shape[1] == length:  # else it is another program
            ahead.wait(annotate)
            ahead.wait(update)
        placed, stats = shaped_scores(rollout, scores, state.score_stats, config.scores, length, self.mesh)
        baseline = None
        if greedy:
            known = "none" if config.scores.normalise == "none" else "reference"  # nothing is added to the statistics
            same = dataclasses.replace(config.scores, normalise=known)
            baseline, _ = shaped_scores(*greedy, stats, same, length, self.mesh)
        frozen = {role: sharding.to_device(part) for role, part in self.frozen.items()}
        compared, before = annotate(state, frozen, rollout, placed, baseline, roles=self.roles)
        del state, frozen
        if config.reference.offload:
            jax.block_until_ready(compared)  # the reference has left before moments and gradients come
        state = dataclasses.replace(self.state.ready, score_stats=stats)
        under = {"policy": self.frozen["policy"]}
        self.state.value, after = update(state, under, compared, key, roles=self.roles)
        rate = after.pop("policy/learning_rate")
        return compared, before | after | {"learning_rate": rate, "objective/raw_scores": float(np.mean(scores))}

    def compile(self, rollout: Future[Rollout], key: Array, *, per_token: bool) -> None:
        """Begin to compile what learns from a rollout of full length; rewards of single tokens count by their sum."""
        del per_token
        state, roles, ahead = self.state.template, self.roles, self.sampler.programs
        scores = sharding.put_rows(np.zeros(self.config.grpo.batch_size, np.float32), self.mesh)
        baseline = scores if self.config.grpo.recipe.advantage == "greedy" else None
        frozen = {role: sharding.on_device(part) for role, part in self.frozen.items()}
        annotated = without_moments(state), frozen
        made = ahead.begin(
            lambda: compilation.compile_shapes(annotate, *annotated, rollout.result(), scores, baseline, roles=roles),
            annotate,
        )
        under = {"policy": self.frozen["policy"]}
        ahead.begin(
            lambda: compilation.compile_shapes(update, state, under, made.result()[0], key, roles=roles), update
        )


def rejected_tokens(config: GRPOConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of grpo.rejected_text as a whole response; none where there is none. Raises ConfigError where there is
    no room for them."""
    text, length = config.grpo.rejected_text, config.sampling.response_length
    if text is None:
        return ()
    tokens = tokenizer.encode_batch([tokenizer.escape(text)], [True])[0]
    tokens += [tokenizer.eos_id] * (tokenizer.eos_id is not None)
    if not 0 < len(tokens) <= length:
        raise ConfigError(
            f"grpo.rejected_text has {len(tokens)} tokens with its end, and a response may have from 1 to {length}; "
            "change the text, or sampling.response_length"
        )
    return tuple(tokens)
