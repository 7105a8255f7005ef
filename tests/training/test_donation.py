"""No optimizer step holds two copies of what trains: the compiled programs say so, for a shape where parameters are
nearly all there is."""

import dataclasses
import itertools

import jax
import pytest
from support.tiny import tiny

from jaxrlhf import models, sharding
from jaxrlhf.config import PPO, LoRA, Mesh, Optim, PPOConfig, RewardConfig
from jaxrlhf.training import abstract, adapters, sft
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.ppo import critic as ppo_critic
from jaxrlhf.training.ppo import update as ppo_update
from jaxrlhf.training.reward import loss, trainer
from jaxrlhf.training.state import State
from jaxrlhf.training.step import Spec
from jaxrlhf.types import Batch, Responses, Rollout

B, P, R = 2, 4, 4
KEY = jax.random.key(0)
MESH = sharding.make_mesh(Mesh())
DEEP = tiny(
    vocab_size=128, hidden_size=128, head_dim=32, mlp_size=512, num_layers=16, sliding_layers=(False,) * 16,
    remat="full",
)  # fmt: skip


def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


def param_shapes(model, lora):
    """Shapes of the parameters in float32 with their adapters."""
    return abstract.abstract_call(lambda: adapters.add_adapters(models.init(model, KEY), model, lora, KEY), MESH)


def supervised(method, model, lora, optimizer, rows=B, response=R):
    """(program, state, other arguments, static ones) of a step on `rows`."""
    role, program = {"sft": ("policy", sft.update), "reward": ("reward", trainer.update)}[method]
    trained, frozen = adapters.split_trainable(param_shapes(model, lora), lora.enabled)
    state = State({role: trained}, {role: optimizer}, MESH).template
    size = rows, P + response
    batch = Batch(array("int32", *size), array("bool", *size), array("bool", *size))
    spec = Spec(model, optimizer, 1, MESH, loss.objective_of(RewardConfig()) if method == "reward" else "nll")
    if method == "sft":
        return program, state, (frozen, batch, KEY), {"spec": spec}
    pairs = array("int32", B, 2, P + R), array("bool", B, 2, P + R), array("bool", B, 2), array("float32", B)
    return program, state, (frozen, Responses(*pairs), KEY), {"spec": spec}


def ppo(model, lora, optimizer, response=R):
    """The same of two mini-batches, of B rows together."""
    config = PPOConfig(ppo=PPO(batch_size=B, num_mini_batches=2, num_ppo_epochs=2), lora=lora)
    policy = param_shapes(model, lora)
    trained, base = adapters.split_trainable(policy, lora.enabled)
    value = ppo_critic.critic_model(config, model, None)
    critic, trunk = jax.eval_shape(
        lambda p: ppo_critic.init_critic(config, value, p, p, None, MESH, KEY), base or policy
    )
    optimizers = {"policy": optimizer, "critic": optimizer}
    roles = ppo_update.PPOSpec(
        policy=model,
        critic=value,
        optimizers=tuple(optimizers.items()),
        ppo=config.ppo,
        temperature=1.0,
        trunk="own",
        mesh=MESH,
        reference=config.reference,
    )
    state = State({"policy": trained, "critic": critic}, optimizers, MESH, 0.1).template
    frozen = {"policy": base, "reference": base or policy, "critic": trunk}
    token, row = array("float32", B, response), array("int32", B)
    mask, of_responses = array("bool", B, P + response), array("bool", B, response)
    rollout = Rollout(array("int32", B, P + response), mask, of_responses, token, array("bool", B), row, row)
    scores = array("float32", B)
    experience, _ = jax.eval_shape(lambda *args: ppo_update.annotate(*args, spec=roles), state, frozen, rollout, scores)
    return ppo_update.update, state, (frozen, experience, KEY), {"spec": roles}


@pytest.mark.parametrize(
    ("method", "lora", "storage"),
    [
        *itertools.product(["sft", "reward", "ppo"], [LoRA(), LoRA(enabled=True, rank=64)], ["float32"]),
        ("ppo", LoRA(), "bfloat16"),
    ],
)
def test_a_step_holds_one_copy_of_the_state_and_one_of_the_gradients(method, lora, storage):
    """And in bfloat16 neither a moment in float32 nor the bits that round it, not even outside of the loops."""
    model = adapters.with_adapters(dataclasses.replace(DEEP, head="linear" if method == "reward" else "lm"), lora)
    optimizer = make_optimizer(Optim(state_dtype=storage), 1e-5, 10)
    made = ppo(model, lora, optimizer) if method == "ppo" else supervised(method, model, lora, optimizer)
    program, state, args, static = made
    memory = program.lower(state, *args, **static).compile().memory_analysis()
    gradients = sum(4 * x.size for x in jax.tree.leaves(state.params))
    kept = gradients * (2 if storage == "bfloat16" else 3)  # parameters and both moments
    assert kept <= memory.alias_size_in_bytes <= 1.01 * kept
    assert memory.temp_size_in_bytes < 1.25 * gradients, "activations are a few hundredths; a copy would be 0.5 or 1"


def test_activations_of_policy_and_critic_are_not_in_memory_together():
    """Those of SFT on as many rows tell how large the policy's are."""
    model, lora = dataclasses.replace(DEEP, remat="none"), LoRA()
    optimizer = make_optimizer(Optim(), 1e-5, 10)
    rest = []
    for made in (supervised("sft", model, lora, optimizer, 1, 252), ppo(model, lora, optimizer, 252)):
        program, state, args, static = made
        memory = program.lower(state, *args, **static).compile().memory_analysis()
        gradients = sum(4 * x.size for x in jax.tree.leaves(state.params))
        rest.append(memory.temp_size_in_bytes - gradients)
    alone, together = rest
    assert alone > 2e7, "enough to see"
    assert together < 1.3 * alone
