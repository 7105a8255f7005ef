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

from bench_process import Job, Turns, peak_resident, timed
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


def texts() -> list[str]:
    rows = np.random.default_rng(0).integers(3, shape["vocab_size"], (job.batch, job.prompt))
    return [" ".join(f"w{i}" for i in row) for row in rows]


def generation() -> Callable[[], dict[str, Any]]:
    """Run tunix's sampler over the whole vocabulary (top_p 1)."""
    model = make_model(job.dtype)
    config = model.config
    slots = job.prompt + job.response + 1
    cache = CacheConfig(slots, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler = Sampler(model, AutoTokenizer.from_pretrained(job.model), cache)
    prompts, seed = texts(), 0

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


def iterations() -> None:
    """Run tunix's PPO. The learner runs all iterations; its data iterator reports each and waits for the next turn."""
    from tunix.rl import rl_cluster, utils
    from tunix.rl.ppo import ppo_learner
    from tunix.rl.rollout.base_rollout import RolloutConfig

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    micro = job.micro_batch or job.batch
    roles = rl_cluster.Role
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
            critic_optimizer=optax.adamw(1e-6, weight_decay=0.0),
            eval_every_n_steps=10**9,
            max_steps=10**9,
            mini_batch_size=job.batch,
            train_micro_batch_size=micro,
        ),
    )
    cluster = rl_cluster.RLCluster(
        actor=make_model("float32"),
        critic=utils.create_critic_model(make_model("float32", tied=False)),
        reference=make_model("float32"),
        reward=utils.create_critic_model(make_model("float32", tied=False)),
        tokenizer=AutoTokenizer.from_pretrained(job.model),
        cluster_config=config,
    )
    learner = ppo_learner.PPOLearner(cluster, ppo_learner.PPOConfig(num_iterations=job.epochs))

    def batches() -> Iterator[dict[str, Any]]:
        prompts, started = np.array(texts()), 0.0
        for turn in itertools.count(-1):  # two to warm up
            yield {"prompts": prompts}
            if turn < 0:
                continue
            trained = nnx.state(cluster.actor_trainer.model), nnx.state(cluster.critic_trainer.model)
            jax.block_until_ready(jax.tree.leaves(trained))
            if turn > 0:
                turns.say(seconds=time.perf_counter() - started, tokens=job.batch * job.response)
            else:
                turns.ready(*PACKAGES)
            if not turns.go():
                turns.say(peak_bytes=peak_bytes())
                os._exit(0)
            started = time.perf_counter()

    with mesh:
        learner.train(batches())


def peak_bytes() -> int:
    """Peak memory of the device, if it has its own memory, otherwise of this process."""
    if job.device == "cpu":
        return peak_resident()
    return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


if __name__ == "__main__":
    os.chdir(Path(job.work))  # tunix writes logs to the working directory
    if job.case == "ppo":
        iterations()
    else:
        repeat = generation()
        turns.ready(*PACKAGES)
        turns.serve(repeat, peak_bytes)
