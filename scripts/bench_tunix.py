"""google-tunix as a peer of bench.py, which starts `bench_tunix.py tunix JOB` in tunix's own environment.

Its llama class fixes sizes that differ from shape S, so every shape uses its Qwen2 class with the shape's sizes. This
adds biases on q, k and v to S, a thousandth of its parameters. Critic and reward model come from `create_critic_model`.
"""

# pyright: reportMissingImports=false

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench_process import Job, Turns, characters, peak_resident, timed
from bench_shapes import SHAPES

turns = Turns()
_, job = sys.argv[1], Job(**json.loads(sys.argv[2]))
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from flax import nnx  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from tunix.generate.sampler import CacheConfig, Sampler  # noqa: E402
from tunix.models.qwen2 import model as qwen2  # noqa: E402

PACKAGES = ("google-tunix", "jax", "jaxlib", "flax")
shape = SHAPES[job.shape]
NO_TOKEN = shape["vocab_size"] + 1  # as the only end token: every response has full length


def make_model(param_dtype: str, tied: bool = True) -> Any:
    heads, width = shape["num_attention_heads"], shape["hidden_size"]
    config = qwen2.ModelConfig(
        num_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=width,
        hidden_dim=shape["intermediate_size"],
        num_heads=heads,
        head_dim=width // heads,
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=int(shape["rope_theta"]),
        norm_eps=shape["rms_norm_eps"],
        use_tied_embedding=tied,
        dtype=jnp.dtype(job.dtype),
        param_dtype=jnp.dtype(param_dtype),
        remat_config=qwen2.RematConfig.DECODER if job.checkpointing else qwen2.RematConfig.NONE,
    )
    return qwen2.Qwen2(config, rngs=nnx.Rngs(0))


def random_tokens(rows: int, columns: int) -> Any:
    return np.random.default_rng(0).integers(3, shape["vocab_size"], (rows, columns))


def texts(rows: int) -> list[str]:
    return [" ".join(f"w{i}" for i in row) for row in random_tokens(rows, job.prompt)]


def generation() -> Callable[[], dict[str, Any]]:
    """Run tunix's sampler over the whole vocabulary (top_p 1)."""
    model = make_model(job.dtype)
    config = model.config
    slots = job.prompt + job.response + 1
    cache = CacheConfig(slots, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler = Sampler(model, AutoTokenizer.from_pretrained(job.model), cache)
    prompts, seed = texts(job.batch), 0

    def run(length: int) -> int:
        found = sampler(
            prompts,
            max_generation_steps=length,
            max_prompt_length=job.prompt,
            eos_tokens=[NO_TOKEN],
            temperature=1.0,
            top_p=1.0,
            seed=seed,
        )
        return sum(len(row) for row in found.tokens)

    def repeat() -> dict[str, Any]:
        nonlocal seed
        seed += 1
        prefill, _ = timed(lambda: run(1))
        seconds, tokens = timed(lambda: run(job.response))
        return {"seconds": seconds, "tokens": tokens, "phases": {"prefill": prefill}}

    repeat()
    return repeat


def in_turns(parts: list[dict[str, Any]], tokens: int, trained: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """Data of a learner, which takes all `parts` in a turn: reports each turn, once the state of the models `trained()`
    is computed, and waits for the next. The first two warm up."""
    started = 0.0
    for turn in itertools.count(-1):
        yield from parts
        if turn < 0:
            continue
        jax.block_until_ready(jax.tree.leaves(trained()))
        if turn > 0:
            turns.say(seconds=time.perf_counter() - started, tokens=tokens)
        else:
            turns.ready(*PACKAGES)
        if not turns.go():
            turns.say(peak_bytes=peak_bytes())
            os._exit(0)
        started = time.perf_counter()


def one_device() -> Any:
    return jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def preferences() -> None:
    """Run optimizer steps of tunix's DPO, with the reference's log-probs in each."""
    from tunix.sft.dpo import dpo_trainer

    micro, width = job.micro_batch or job.batch, job.prompt + job.response
    config = dpo_trainer.DPOTrainingConfig(
        eval_every_n_steps=10**9, max_steps=10**9, gradient_accumulation_steps=job.batch // micro
    )
    model, reference = make_model("float32"), make_model("float32")
    trainer = dpo_trainer.DPOTrainer(model, reference, optax.adamw(1e-6, weight_decay=0.0), config)
    rows = random_tokens(2 * job.batch, width).astype(np.int32)
    prompts, chosen, rejected = rows[: job.batch, : job.prompt], *np.split(rows[:, job.prompt :], 2)
    batch = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected}
    batch |= {name.replace("ids", "mask"): np.ones_like(ids) for name, ids in batch.items()}
    parts = [{k: v[start : start + micro] for k, v in batch.items()} for start in range(0, job.batch, micro)]
    with one_device():
        trainer.train(in_turns(parts, 2 * job.batch * width, lambda: nnx.state(trainer.model)))


def iterations() -> None:
    """Run iterations of tunix's PPO, or of its GRPO with a reward function."""
    from tunix.rl import rl_cluster, utils
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.ppo import ppo_learner
    from tunix.rl.rollout.base_rollout import RolloutConfig

    group = job.samples if job.case == "grpo" else 1  # batches are counted in prompts
    mesh, roles = one_device(), rl_cluster.Role
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys((roles.ACTOR, roles.CRITIC, roles.REFERENCE, roles.REWARD, roles.ROLLOUT), mesh),
        rollout_config=RolloutConfig(
            max_tokens_to_generate=job.response,
            max_prompt_length=job.prompt,
            kv_cache_size=job.prompt + job.response + 1,
            temperature=1.0,
            top_p=1.0,
            eos_tokens=[NO_TOKEN],
        ),
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optax.adamw(1e-6, weight_decay=0.0),
            critic_optimizer=optax.adamw(1e-6, weight_decay=0.0) if job.case == "ppo" else None,
            eval_every_n_steps=10**9,
            max_steps=10**9,
            mini_batch_size=job.batch // group,
            train_micro_batch_size=(job.micro_batch or job.batch) // group,
        ),
    )
    judges = {}
    if job.case == "ppo":
        names = "critic", "reward"
        judges = {name: utils.create_critic_model(make_model("float32", tied=False)) for name in names}
    cluster = rl_cluster.RLCluster(
        actor=make_model("float32"),
        reference=make_model("float32"),
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        cluster_config=config,
        **judges,
    )
    if job.case == "ppo":
        learner = ppo_learner.PPOLearner(cluster, ppo_learner.PPOConfig(num_iterations=job.epochs))
    else:
        settings = grpo_learner.GRPOConfig(num_generations=group, num_iterations=job.epochs)
        learner = grpo_learner.GRPOLearner(cluster, settings, characters)

    def trained() -> Any:
        trainers = [cluster.actor_trainer] + ([cluster.critic_trainer] if judges else [])
        return [nnx.state(trainer.model) for trainer in trainers]

    prompts = {"prompts": np.array(texts(job.batch // group))}
    with mesh:
        learner.train(in_turns([prompts], job.batch * job.response, trained))


def peak_bytes() -> int:
    """Peak memory of the device, if it has its own memory, otherwise of this process."""
    if job.device == "cpu":
        return peak_resident()
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


if __name__ == "__main__":
    os.chdir(Path(job.work))  # tunix writes logs to the working directory
    if job.case == "dpo":
        preferences()
    elif job.case in ("ppo", "grpo"):
        iterations()
    else:
        repeat = generation()
        turns.ready(*PACKAGES)
        turns.serve(repeat, peak_bytes)
