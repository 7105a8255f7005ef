"""What each memory saver saves of a PPO run: sizes of what it keeps and of its compiled programs. Nothing is run."""

import functools
from typing import Any

import jax
from bench_process import Job

from jaxrlhf import config, runtime, sharding, weights
from jaxrlhf.config import PPO, Mesh, ModelSource, Optim, PPOConfig, Sampling
from jaxrlhf.models import ModelConfig
from jaxrlhf.rollout.decode import generate
from jaxrlhf.rollout.inference_copy import convert, inference_model
from jaxrlhf.training import ppo_roles, ppo_update, setup
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.types import Prompts, Rollout

LORA = {"lora.enabled": True, "lora.rank": 16}
AWAY = {"optim.offload": True, "reference.offload": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "model.remat dots": {"model.remat": "dots"},
    "model.remat full": {"model.remat": "full"},
    "ppo.micro_batch_size 2": {"ppo.micro_batch_size": 2},
    "optim.state_dtype bfloat16": {"optim.state_dtype": "bfloat16"},
    "optim.offload": {"optim.offload": True},
    "reference.dtype bfloat16": {"reference.dtype": "bfloat16"},
    "reference.offload": {"reference.offload": True},
    "model.param_dtype bfloat16": {"model.param_dtype": "bfloat16"},
    "rollout.dtype int8": {"rollout.dtype": "int8"},
    "critic.trunk shared": {"critic.trunk": "shared"},
    "lora": LORA,
    "lora over nf4": LORA | {"lora.quantize": "nf4"},
    "all of full": {"model.remat": "full", "optim.state_dtype": "bfloat16", **AWAY},
    "all of lora over nf4": {"model.remat": "full", **LORA, "lora.quantize": "nf4"},
}
"""One change each from float32, nothing recomputed, two mini-batches of one micro-batch; then several at once."""


def array(dtype: str, *shape: int) -> Any:
    """The shape of one."""
    return jax.ShapeDtypeStruct(shape, dtype)


def size(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def sizes(job: Job, changes: dict[str, Any]) -> dict[str, int]:
    """Bytes: `parameters` and `moments` of policy and critic, `reference` and what else is `frozen`, `program` of the
    update, and on the device during an `update` and a `rollout` all in all (without a reward model)."""
    mesh, key = sharding.make_mesh(Mesh()), jax.random.key(0)
    run = config.replace(
        PPOConfig(
            model=ModelSource(path=job.model, init="random", compute_dtype="float32", remat="none"),
            ppo=PPO(batch_size=job.batch, num_ppo_epochs=job.epochs, num_mini_batches=2),
            sampling=Sampling(response_length=job.response),
            optim=Optim(),
        ),
        **changes,
    )
    remat = runtime.resolve_remat(run.model.remat, jax.default_backend())
    model = weights.load_config(job.model, compute_dtype="float32", remat=remat)
    model = setup.with_adapters(model, run.lora)
    policy = setup.shapes_of(model, setup.storage_of(run), mesh, run.lora)
    trained, base = setup.split(policy, run.lora.enabled)
    copied = functools.partial(setup.copy, dtype=ppo_roles.reference_dtype(run, model), mesh=mesh)
    reference = base or jax.eval_shape(copied, policy)
    critic, trunk = jax.eval_shape(
        lambda p, r: ppo_roles.make_critic(run, model, p, r, None, mesh, key)[1:], base or policy, reference
    )
    optimizer = make_optimizer(run.optim, 1e-6, 100)
    optimizers = {"policy": optimizer, "critic": optimizer}
    roles = ppo_roles.Roles(
        policy=model,
        critic=ppo_roles.critic_model(run, model, None),
        optimizers=tuple(optimizers.items()),
        ppo=run.ppo,
        temperature=1.0,
        trunk=ppo_roles.trunk_kind(run),
        mesh=mesh,
    )
    state = setup.State({"policy": trained, "critic": critic}, optimizers, mesh, 0.1).template
    frozen = {"policy": base, "reference": reference, "critic": trunk}
    annotated = functools.partial(ppo_update.annotate, roles=roles)
    made = rollout(job)
    experience, _ = jax.eval_shape(annotated, state, frozen, made, array("float32", job.batch))
    learnt = {role: frozen[role] for role in ("policy", "critic")}
    program: Any = ppo_update.update.lower(state, learnt, experience, key, roles=roles).compile().memory_analysis()
    found = {
        "parameters": size(state.params),
        "moments": size(state.opt_state),
        "reference": 0 if base else size(reference),
        "frozen": size(base),  # with adapters, what lies under all roles
        "program": program.temp_size_in_bytes,
    }
    away = {"moments": run.optim.offload, "reference": run.reference.offload}
    kept = sum(found[part] for part in ("parameters", "moments", "reference", "frozen"))
    found["update"] = kept - found["reference"] * away["reference"] + found["program"]
    found["rollout"] = kept - sum(found[part] for part in away if away[part]) + sampling(job, run, model, policy, key)
    return found


def rollout(job: Job) -> Rollout:
    rows, response, width = job.batch, job.response, job.prompt + job.response
    token, row = array("float32", rows, response), array("int32", rows)
    whole, said = array("bool", rows, width), array("bool", rows, response)
    return Rollout(array("int32", rows, width), whole, said, token, array("bool", rows), row, row)


def sampling(job: Job, run: PPOConfig, model: ModelConfig, policy: Any, key: jax.Array) -> int:
    """The copy of the policy that decodes, and the program that decodes with it."""
    small = inference_model(model, "float32" if run.rollout.dtype == "auto" else run.rollout.dtype)
    copy = jax.eval_shape(lambda params: convert(params, model, small), policy)
    row, tokens = array("int32", job.batch), (job.batch, job.prompt)
    prompts = Prompts(array("int32", *tokens), array("bool", *tokens), row, row)
    program: Any = generate.lower(copy, small, prompts, key, run.sampling, (), 1).compile().memory_analysis()
    return size(copy) + program.temp_size_in_bytes


def table(job: Job) -> dict[str, dict[str, float]]:
    """Gigabytes of every variant. `logits` of a mini-batch are what log-probs in one piece would make, once in the
    forward pass and once in the backward pass."""
    vocabulary = weights.load_config(job.model).vocab_size
    logits = array("float32", job.batch // 2, job.response, vocabulary)
    found = {name: sizes(job, changes) for name, changes in VARIANTS.items()}
    found["log-probs in one piece"] = {"logits": size(logits)}
    return {name: {part: round(count / 1e9, 4) for part, count in row.items()} for name, row in found.items()}
