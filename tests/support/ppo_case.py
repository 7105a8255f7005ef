"""A small PPO problem: a policy that has moved from its reference, a ragged rollout of it, scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from support.tiny import tiny

from jaxrlhf import sharding
from jaxrlhf.config import PPO, Critic, Mesh, Optim, PPOConfig, Reference, Sampling
from jaxrlhf.models import init
from jaxrlhf.rollout.decode import generate
from jaxrlhf.rollout.inference_copy import inference_copy
from jaxrlhf.training import setup
from jaxrlhf.training.on_policy.update import take_rows
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.ppo import critic as ppo_critic
from jaxrlhf.training.ppo import replay as ppo_replay
from jaxrlhf.training.ppo import update as ppo_update
from jaxrlhf.training.state import State
from jaxrlhf.types import Prompts

B, P, R, V, PAD = 8, 6, 7, 19, 0
STOPS = (2, 5, 11)

MODEL = tiny(vocab_size=V, mlp_size=32)
# Compared by identity: one pair for all cases, so that equal cases share their compiled programs. A large eps, because
# Adam magnifies the rounding of a gradient near zero by learning_rate / eps and these tests compare parameters.
OPTIMIZERS = tuple((role, make_optimizer(Optim(eps=1e-3), 1e-2, 100)) for role in ("policy", "critic"))


def prompts() -> Prompts:
    lengths = np.arange(B) % P + 1
    mask = np.arange(P) >= P - lengths[:, None]
    tokens = np.where(mask, 3 + (np.arange(B)[:, None] * 5 + np.arange(P)) % (V - 3), PAD)
    return Prompts(jnp.asarray(tokens, jnp.int32), jnp.asarray(mask), jnp.arange(B), jnp.zeros(B, jnp.int32))


@dataclasses.dataclass
class Case:
    """One PPO problem: roles, frozen parameters, a way to make its state, a rollout and scores."""

    config: PPOConfig
    spec: ppo_update.PPOSpec
    frozen: dict
    policy: dict
    rollout: object
    scores: jax.Array
    token_scores: jax.Array | None = None

    def state(self):
        params = {"policy": setup.cast_copy(self.policy, "float32", self.spec.mesh), "critic": self.critic()}
        more = {}
        if self.spec.reference.sync_every:
            more["reference"] = setup.cast_copy(self.frozen["reference"], "float32", self.spec.mesh)
        if self.spec.ppo.replay:
            empty = ppo_replay.empty_replay(self.config, self.spec, (P, R))
            more["replay"] = sharding.put_whole(jax.tree.map(lambda x: np.array(x), empty), self.spec.mesh)
        return State(params, dict(self.spec.optimizers), self.spec.mesh, self.spec.ppo.kl_coef, **more).value

    def critic(self):
        critic, self.frozen["critic"] = ppo_critic.init_critic(
            self.config,
            ppo_critic.critic_model(self.config, self.spec.policy, None),
            self.policy,
            self.frozen["reference"],
            None,
            self.spec.mesh,
            jax.random.key(0),
        )
        critic["score"] = {"kernel": 0.3 * jax.random.normal(jax.random.key(5), (16, 1))}
        return critic

    def run(self, state=None, scores=None):
        state = state or self.state()
        scores = self.scores if scores is None else scores
        experience, before = ppo_update.annotate(
            state, self.frozen, self.rollout, scores, self.token_scores, spec=self.spec
        )
        train = ppo_replay.update_with_replay if self.spec.ppo.replay else ppo_update.update
        state, after = train(state, self.frozen, experience, jax.random.key(3), spec=self.spec)
        known = {key.removesuffix("_rows"): values for key, values in take_rows(after).items()}
        experience = dataclasses.replace(experience, **known)
        return state, experience, before | after


def case(
    ppo: PPO | None = None,
    *,
    dtype: str = "float32",
    rollout_dtype: str | None = None,
    drift: float = 0.3,
    mesh: Mesh | None = None,
    filters: dict | None = None,
    critic: Critic | None = None,
    moving: Reference | None = None,
    optimizers=OPTIMIZERS,
    **options,
) -> Case:
    """The policy has moved `drift` away from the reference, as after some updates."""
    ppo = ppo or PPO(**{"batch_size": B, "num_ppo_epochs": 2, "num_mini_batches": 2} | options)
    sampling = Sampling(response_length=R, temperature=0.7, **filters or {})
    config = PPOConfig(ppo=ppo, critic=critic or Critic(), reference=moving or Reference(), sampling=sampling)
    model = dataclasses.replace(MODEL, dtype=dtype)
    reference = jax.tree.map(lambda x: 8 * x if x.ndim > 2 else x, init(model, jax.random.key(0)))
    other = init(model, jax.random.key(1))
    policy = jax.tree.map(lambda a, b: a + drift * b, reference, other)
    roles = ppo_update.PPOSpec(
        policy=model,
        critic=dataclasses.replace(model, head="linear"),
        optimizers=optimizers,
        ppo=ppo,
        temperature=0.7,
        trunk=ppo_critic.trunk_of(config),
        mesh=sharding.make_mesh(mesh or Mesh()),
        reference=config.reference,
        warmup_updates=config.critic.warmup_updates,
    )
    decoder, copy = inference_copy(model, policy, rollout_dtype or model.dtype)
    rollout = generate(copy, decoder, prompts(), jax.random.key(2), sampling, STOPS, PAD)
    frozen = {"policy": {}, "reference": reference, "critic": {}}
    return Case(config, roles, frozen, policy, rollout, jnp.linspace(-1, 1, B))


def close(a, b, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)
