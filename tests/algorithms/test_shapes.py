"""Every public function of jaxrlhf.algorithms refuses arguments of a wrong shape, without jaxtyping too."""

import importlib
import inspect
import pkgutil
import types
import typing

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from jaxrlhf import algorithms, config
from jaxrlhf.algorithms import dpo, entropy, masked, ppo, scores

AXES = {"B": 4, "R": 3, "T": 3, "K": 3, "*shape": 3, "*tokens": 3, "V": 5, "E": 4}
# functions of one array: no shape is wrong, but integers are
ELEMENTWISE = {"dpo.divergence_scores", "masked.power_of_two", "reward.smoothed"}
NO_ARRAYS = {"scores.no_stats", "dpo.RunningMean.add"}
STATS = scores.ScoreStats(np.float32(1), np.float32(0), np.float32(1))  # not checked: only functions here build them
SELVES = {"ScoreStats": STATS, "EntropyControl": entropy.EntropyControl(np.float32(0), np.float32(0))}
METRICS = [
    *("val/ratio", "val/ratio_spread"),
    *(f"{name}/{kind}" for name in ("rewards", "logps", "share") for kind in ("chosen", "rejected")),
]
ARGUMENTS = {
    ppo.Clip: ppo.Clip(0.2, 0.2, None, 10.0),
    dpo.Coefs: dpo.Coefs(0.1, 0.1, 0.1),
    dpo.Divergence: dpo.Divergence("reverse_kl", 0.0),
    dpo.Loss: dpo.LOSSES["sigmoid"],
    scores.ScoreStats: STATS,
    config.Scores: config.Scores(normalise="running"),
    tuple[masked.Scalar, ...]: (0.5,),
    bool: True,
    int: 2,
    float: 0.5,
}


def public_functions() -> dict[str, typing.Any]:
    functions = {}
    for info in pkgutil.iter_modules(algorithms.__path__):
        module = importlib.import_module(f"{algorithms.__name__}.{info.name}")
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if not inspect.isclass(value):
                functions[f"{info.name}.{name}"] = value
                continue
            for method, function in vars(value).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    functions[f"{info.name}.{name}.{method}"] = function
    return functions


FUNCTIONS = public_functions()


def array(annotation) -> jax.Array:
    dtype = {jaxtyping.Float: jnp.float32, jaxtyping.Int: jnp.int32, jaxtyping.Bool: jnp.bool_}[annotation.dtype]
    return jnp.ones([AXES[axis] for axis in annotation.dim_str.split()], dtype)


def argument(annotation):
    """A value that fits the annotation."""
    if annotation in (masked.Scalar, masked.Scalar | None):
        return 0.5
    if annotation == masked.Metrics:
        return {name: jnp.ones(()) for name in METRICS}
    if annotation is dpo.Logprobs:
        return dpo.Logprobs(*(argument(field) for field in dpo.Logprobs.__annotations__.values()))
    if annotation in ARGUMENTS:
        return ARGUMENTS[annotation]
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return members[0]
    if origin is tuple:
        return tuple(argument(member) for member in members)
    if origin in (typing.Union, types.UnionType):
        return argument(members[0])
    return array(annotation)


def arguments(name: str) -> list[typing.Any]:
    """Arguments of the right shapes, in the order of the parameters."""
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    return [SELVES[name.split(".")[1]] if p.name == "self" else argument(p.annotation) for p in parameters]


def call(name: str, given: list[typing.Any]):
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    by_name = dict(zip(parameters, given, strict=True))
    positional = [by_name.pop(p.name) for p in parameters.values() if p.kind is not p.KEYWORD_ONLY]
    return FUNCTIONS[name](*positional, **by_name)


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - NO_ARRAYS))
def test_wrong_shape_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    right = arguments(name)
    call(name, right)

    leaves, structure = jax.tree.flatten(right)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]
    assert places, "no array among the arguments"
    for i in places:
        wrong = list(leaves)
        wrong[i] = wrong[i].astype(int) if name in ELEMENTWISE else wrong[i][..., None]
        with pytest.raises(AssertionError):
            call(name, jax.tree.unflatten(structure, wrong))
