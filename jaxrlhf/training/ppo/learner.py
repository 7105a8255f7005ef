"""The learning half of PPO: policy, critic, reference and their optimizers, and the update that moves them."""

import dataclasses
import functools
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrlhf import compilation, sharding
from jaxrlhf.algorithms.scores import no_stats
from jaxrlhf.config import PPOConfig
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig
from jaxrlhf.training import setup
from jaxrlhf.training.on_policy.learner import shaped_scores, without_moments
from jaxrlhf.training.on_policy.policy import policy_params, reference_dtype, reference_params
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.ppo.replay import empty_replay, widened
from jaxrlhf.training.ppo.roles import (
    Roles,
    critic_model,
    make_critic,
    trunk_kind,
)
from jaxrlhf.training.ppo.update import annotate, update
from jaxrlhf.training.state import State
from jaxrlhf.training.step import Metrics
from jaxrlhf.types import Experience, Params, Rollout


def _begin(
    config: PPOConfig,
    model: ModelConfig,
    critic_model: ModelConfig,
    policy: Params,
    judge: Params | None,
    mesh: jax.sharding.Mesh,
    keys: tuple[Array, Array],
) -> tuple[dict[str, Params], dict[str, Params], Params, Params | None]:
    """(what trains, what is frozen, both by role; the reference; what of it moves) at step 0. Runs under eval_shape."""
    critic_key, lora_key = keys
    trained, base = setup.split_trainable(setup.add_adapters(policy, model, config.lora, lora_key), config.lora.enabled)
    reference = base or setup.cast_copy(policy, reference_dtype(config.reference, model), mesh)
    critic, trunk = make_critic(config, critic_model, base or policy, reference, judge, mesh, critic_key)
    moving = None
    if config.reference.sync_every:
        moving = setup.cast_copy(trained, "float32", mesh) if base else reference
    stays = reference if moving is None else base
    return (
        {"policy": trained, "critic": critic},
        {"policy": base, "reference": stays, "critic": trunk},
        reference,
        moving,
    )


class Learner:
    """Learns from the scored rollouts of `sampler` for `updates` updates, starting from `policy`, which it takes over;
    with adapters, what is under them is shared by policy, reference and critic.

    `judge` is the reward model, if there is one that a critic could start from. With `abstract`, parameters are shapes,
    and nothing can be learnt. Raises ConfigError for what the config asks of models or devices that they cannot do.
    """

    def __init__(
        self,
        config: PPOConfig,
        sampler: Sampler,
        policy: Params,
        judge: tuple[ModelConfig, Params] | None,
        updates: int,
        keys: tuple[Array, Array],
        *,
        abstract: bool = False,
    ) -> None:
        self.config, self.sampler, self.mesh = config, sampler, sampler.mesh
        ppo, model = config.ppo, sampler.model
        critic = critic_model(config, model, judge and judge[0])

        def begin(policy: Params, judge: Params | None) -> tuple[dict[str, Params], dict[str, Params], Params, Any]:
            return _begin(config, model, critic, policy, judge, self.mesh, keys)

        given = policy, judge and judge[1]
        trained, self.frozen, reference, moving = (
            setup.abstract_call(begin, self.mesh, *given) if abstract else begin(*given)
        )
        self.identity = "" if abstract else setup.params_fingerprint(reference)
        if config.reference.offload and not abstract:
            self.frozen["reference"] = sharding.to_host(reference)

        def steps(first: int) -> int:
            """Optimizer steps from update `first` on; a rollout is only there to be learnt from again once it is."""
            passes = sum(1 + min(number, ppo.replay) for number in range(first, updates))
            return passes * ppo.num_ppo_epochs * ppo.num_mini_batches

        rate = config.optim.learning_rate
        own = config.critic.max_grad_norm or config.optim.max_grad_norm
        optimizers = {
            "policy": make_optimizer(config.optim, rate, steps(config.critic.warmup_updates)),
            "critic": make_optimizer(
                dataclasses.replace(config.optim, max_grad_norm=own), config.critic.learning_rate or rate, steps(0)
            ),
        }
        self.roles = Roles(
            policy=model,
            critic=critic,
            optimizers=tuple(optimizers.items()),
            ppo=ppo,
            temperature=config.sampling.temperature,
            trunk=trunk_kind(config),
            mesh=self.mesh,
            warmup_updates=config.critic.warmup_updates,
            sync_every=config.reference.sync_every,
            sync_alpha=config.reference.sync_alpha,
        )
        self.state = State(
            trained,
            optimizers,
            self.mesh,
            ppo.kl_coef,
            config.optim.offload,
            score_stats=sharding.put_whole(no_stats(), self.mesh),
            reference=moving,
            replay=self._replay(abstract) if ppo.replay else None,
        )

    @property
    def policy(self) -> Params:
        """The policy's parameters as they are now, adapters and what is under them."""
        return policy_params(self.state.value.params, self.frozen)

    @property
    def reference(self) -> Params:
        """The reference's parameters as they are now, on the device."""
        return sharding.to_device(reference_params(self.state.value, self.frozen))

    def learn(
        self, rollout: Rollout, scores: np.ndarray, token_scores: np.ndarray | None, key: Array
    ) -> tuple[Experience, Metrics]:
        """Shape the scores, annotate the rollout, and make the update's optimizer steps; moves `state` on."""
        config, state, ahead = self.config, without_moments(self.state.value), self.sampler.programs
        if config.ppo.replay:
            pad = self.sampler.tokenizer.pad_id
            rollout, token_scores = widened(rollout, token_scores, self._room(), pad, self.mesh)
        length = config.sampling.response_length
        if rollout.response_mask.shape[1] == length:  # else it is another program
            ahead.wait(annotate)
            ahead.wait(update)
        placed, stats = shaped_scores(rollout, scores, state.score_stats, config.scores, length, self.mesh)
        if token_scores is not None:
            token_scores = sharding.put_rows(np.asarray(token_scores, np.float32), self.mesh)
        frozen = {**self.frozen, "reference": sharding.to_device(self.frozen["reference"])}
        experience, before = annotate(state, frozen, rollout, placed, token_scores, roles=self.roles)
        del state, frozen
        if config.reference.offload:
            jax.block_until_ready(experience)  # the reference has left before moments and gradients come
        state = dataclasses.replace(self.state.ready, score_stats=stats)
        self.state.value, after = update(state, self._learnt_over, experience, key, roles=self.roles)
        rate = after.pop("policy/learning_rate")
        return experience, before | after | {"learning_rate": rate, "objective/raw_scores": float(np.mean(scores))}

    def compile(self, rollout: Future[Rollout], key: Array, *, per_token: bool) -> None:
        """Begin to compile what learns from a rollout of full length, with rewards of single tokens or without."""
        size, length = self.config.ppo.batch_size, self.config.sampling.response_length
        scores = sharding.put_rows(np.zeros(size, np.float32), self.mesh)
        more = sharding.put_rows(np.zeros((size, length), np.float32), self.mesh) if per_token else None
        state, roles, ahead = self.state.template, self.roles, self.sampler.programs
        annotated = (
            without_moments(state),
            {**self.frozen, "reference": sharding.to_device(sharding.abstract(self.frozen["reference"]))},
        )

        def learnt() -> Rollout:
            """What is kept for replay is as wide as it may be."""
            kept = state.replay
            if kept is None:
                return rollout.result()
            one = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), kept.rollout))
            return jax.tree.map(lambda x: sharding.rows_shape(x, self.mesh), one)

        made = ahead.begin(
            lambda: compilation.compile_shapes(annotate, *annotated, learnt(), scores, more, roles=roles), annotate
        )
        frozen = self._learnt_over
        ahead.begin(
            lambda: compilation.compile_shapes(update, state, frozen, made.result()[0], key, roles=roles), update
        )

    @property
    def _learnt_over(self) -> dict[str, Params]:
        """What is frozen and has a part in an update: annotation has said what the reference says."""
        return {role: self.frozen[role] for role in ("policy", "critic")}

    def _replay(self, abstract: bool) -> Experience:
        empty = functools.partial(empty_replay, self.config, self.roles, self._room())
        if abstract:
            return jax.eval_shape(empty)
        # each leaf a buffer of its own: the state is donated, and a buffer is given away once
        return sharding.put_whole(jax.tree.map(lambda x: np.array(x), empty()), self.mesh)

    def _room(self) -> tuple[int, int]:
        """(P, R) of every experience that is kept for replay."""
        if not self.sampler.columns:
            raise ConfigError("ppo.replay keeps rollouts in arrays as wide as the prompts of data.path, which is empty")
        return self.sampler.columns, self.config.sampling.response_length
