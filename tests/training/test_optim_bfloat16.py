"""Adam's moments in bfloat16: rounded without a bias, the same on any mesh, and as good as those in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from support.runs import records

from jaxrlhf import config, sharding
from jaxrlhf.config import Mesh, Optim
from jaxrlhf.training import step
from jaxrlhf.training.optim import average, make_optimizer, scale_by_adam, stochastic_round
from jaxrlhf.training.sft import SFTTrainer
from jaxrlhf.types import TrainState


def test_rounding_goes_to_a_neighbour_and_has_no_bias():
    """Against float64: over all draws, over the seeds at one place, over the places under one seed."""
    places, seeds = 2048, 256
    values = np.geomspace(1e-30, 1e30, 36).astype(np.float32)
    low, high = (((values.view(np.uint32) >> 16) + up << 16).view(np.float32).astype(np.float64) for up in (0, 1))
    x = jnp.broadcast_to(values[:, None], (len(values), places))
    drawn = jax.vmap(lambda seed: stochastic_round(x, seed))(jnp.arange(seeds, dtype=jnp.uint32))
    up = (np.asarray(drawn, np.float64) - low[:, None]) / (high - low)[:, None]  # [seeds, values, places]
    assert np.all((up == 0) | (up == 1))
    chance = (values - low) / (high - low)
    spread = np.sqrt(chance * (1 - chance))
    for mean, draws in ((up.mean((0, 2)), places * seeds), (up.mean(0).T, seeds), (up.mean(2), places)):
        assert np.max(np.abs(mean - chance) / spread) * np.sqrt(draws) < 6
    exact = jnp.tile(jnp.array([0.0, 1.0, 384.0]), 99)
    np.testing.assert_array_equal(stochastic_round(exact, jnp.uint32(3)), exact)


def test_the_second_moment_follows_its_average_where_rounding_to_nearest_would_stop():
    steps, beta2, width = 3000, 0.999, 4096
    adam, grads = scale_by_adam(average(0.9), average(beta2), 1e-8, "bfloat16"), {"w": jnp.ones(width)}
    state, _ = jax.lax.scan(
        lambda state, _: (adam.update(grads, state, finite=jnp.array(True))[1], None), adam.init(grads), length=steps
    )
    nu = np.asarray(state.nu["w"], np.float64)
    assert state.nu["w"].dtype == "bfloat16" and np.std(nu) > 0
    assert abs(np.mean(nu) - (1 - beta2**steps)) < 6 * np.std(nu) / np.sqrt(width)


def test_the_first_moment_is_that_of_optax_to_the_bit(key):
    """Given its moment in float32: from one in bfloat16 optax would make decay * moment in bfloat16 too."""
    ours = scale_by_adam(average(0.9), average(0.999), 1e-8, "bfloat16")
    theirs = optax.scale_by_adam(mu_dtype=jnp.bfloat16)
    params = {"w": jnp.zeros((64, 64))}
    state, expected = ours.init(params), theirs.init(params)
    for i in range(5):
        grads = {"w": jax.random.normal(jax.random.fold_in(key, i), (64, 64))}
        _, state = ours.update(grads, state, finite=jnp.array(True))
        _, expected = theirs.update(grads, expected._replace(mu=optax.tree.cast(expected.mu, jnp.float32)))
        assert state.mu["w"].dtype == "bfloat16"
        np.testing.assert_array_equal(state.mu["w"], expected.mu["w"])


def test_rounding_is_the_same_on_any_mesh(key):
    x, mesh = jax.random.uniform(key, (8, 12, 6)), sharding.make_mesh(Mesh(fsdp=4, tensor=2))
    alone = stochastic_round(x, jnp.uint32(7))
    split = jax.device_put(x, jax.NamedSharding(mesh, P("tensor", "fsdp")))
    np.testing.assert_array_equal(jax.jit(stochastic_round)(split, jnp.uint32(7)), alone)
    assert np.any(stochastic_round(x, jnp.uint32(8)) != alone)


def test_least_squares_end_where_float32_ends(key):
    x = jax.random.normal(key, (256, 16)) * jnp.geomspace(0.1, 10, 16)
    truth = jnp.linspace(-1, 1, 16)
    losses = []
    for storage in ("float32", "bfloat16"):
        optimizer = make_optimizer(Optim(schedule="cosine", state_dtype=storage), 0.02, 400)
        params = {"w": jnp.zeros(16)}

        def descend(state, _):
            loss, grads = jax.value_and_grad(lambda p: jnp.mean((x @ (p["w"] - truth)) ** 2))(state.params["policy"])
            return step.apply(state, {"policy": grads}, loss, (("policy", optimizer),))[0], loss  # noqa: B023

        state = TrainState(jnp.int32(0), {"policy": params}, {"policy": optimizer.chain.init(params)}, jnp.float32(0))
        losses.append(jax.lax.scan(descend, state, length=400)[1])
    exact, short = np.asarray(losses)
    assert short[-1] < 1e-3 * short[0]
    np.testing.assert_allclose(short[-1], exact[-1], rtol=0.2)


def test_sft_ends_where_float32_ends(supervised, tmp_path):
    supervised |= {"train": config.Train(num_train_epochs=8, batch_size=6, eval_batch_size=4, keep_best=False)}
    ends = {}
    for storage in ("float32", "bfloat16"):
        options = supervised | {"optim": config.Optim(learning_rate=1e-2, state_dtype=storage)}
        trainer = SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / storage), **options))
        trainer.train()
        moments = {x.dtype.name for x in jax.tree.leaves(trainer.state.value.opt_state) if x.ndim}
        assert moments == {storage}
        ends[storage] = [record["loss"] for record in records(tmp_path / storage)]
    exact, short = ends["float32"], ends["bfloat16"]
    assert exact[-1] < 0.7 * exact[0] and abs(short[-1] - exact[-1]) < 0.02 * exact[0]
