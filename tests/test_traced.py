"""Settings as arguments of jitted programs."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import config
from jaxrlhf.config.base import constant
from jaxrlhf.traced import Number, settings

EIGHTH = Number(0.125)


class Pair(NamedTuple):
    name: str
    value: float


@settings("whole")
@dataclasses.dataclass(frozen=True)
class Made:
    name: str = "a"
    size: int = 3
    whole: int = 4
    number: float = 0.5
    missing: float | None = None
    pairs: tuple[Pair, ...] = (Pair("x", 0.25), Pair("y", 1.0))
    inner: Any = EIGHTH


def test_numbers_are_leaves_and_everything_else_is_structure():
    assert jax.tree.leaves(Made()) == [4, 0.5, 0.25, 0.125]
    same = Made(whole=7, number=0.75, pairs=(Pair("x", 2.0), Pair("y", 1.0)), inner=Number(3.0))
    assert jax.tree.structure(Made()) == jax.tree.structure(same)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "b"},
        {"size": 4},
        {"whole": 0},
        {"number": 0.0},
        {"number": 1.0},
        {"missing": 0.5},
        {"pairs": (Pair("x", 0.25), Pair("y", 2.0))},
        {"pairs": ()},
        {"inner": Number(0.0)},
        {"inner": 0.125},
    ],
)
def test_what_changes_a_program_is_structure(change):
    assert jax.tree.structure(Made()) != jax.tree.structure(Made(**change))


def test_settings_come_back_as_they_were():
    leaves, structure = jax.tree.flatten(Made())
    assert jax.tree.unflatten(structure, leaves) == Made()
    doubled = jax.tree.map(lambda x: 2 * x, Made())
    assert doubled == Made(whole=8, number=1.0, pairs=(Pair("x", 0.5), Pair("y", 1.0)), inner=Number(0.25))
    assert jax.tree.structure(doubled) == structure, "a number that becomes 1 stays a number"
    assert jax.tree.leaves(dataclasses.replace(Made(), number=0.75)) == [4, 0.75, 0.25, 0.125]


def test_one_program_serves_other_numbers_and_computes_with_them():
    traces = []

    @jax.jit
    def program(x, made):
        traces.append(made)
        assert not constant(made.number, 0) and not constant(made.number, 1)
        assert constant(made.pairs[1].value, 1)
        return x * made.number + made.whole + made.inner.value

    for whole, number, inner in ((4, 0.5, 0.125), (5, 0.75, 0.5)):
        made = Made(whole=whole, number=number, inner=Number(inner))
        assert program(jnp.float32(2), made) == 2 * number + whole + inner
    assert len(traces) == 1


def test_a_decision_by_a_traced_number_is_an_error():
    """So that a program never depends on a number that it was not compiled for."""

    @jax.jit
    def program(made):
        return 1 if made.number > 0.25 else 0

    with pytest.raises(jax.errors.TracerBoolConversionError):
        program(Made())


def test_sections_of_configs_keep_their_properties_in_programs():
    made = config.GRPO(cliprange=0.3, entropy_coef=0.5)
    low, high = jax.jit(lambda grpo: jnp.array(grpo.clip))(made)
    np.testing.assert_array_equal([low, high], np.full(2, 0.3, np.float32))
    assert jax.eval_shape(lambda grpo: jnp.zeros(2 if grpo.has_entropy_bonus else 1), made).shape == (2,)
