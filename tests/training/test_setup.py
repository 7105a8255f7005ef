"""Checks of a run against its model."""

import pytest
from support.tiny import tiny

from jaxrlhf.errors import ConfigError
from jaxrlhf.models import Rope, for_length
from jaxrlhf.training.setup import check_context


def test_lengths_beyond_the_context_or_the_rotation_of_the_run_are_refused():
    factors = {"short_factor": (1.0, 1.0), "long_factor": (2.0, 2.0)}
    model = tiny(rope=Rope(theta=1e4, kind="longrope", factor=4.0, original_max_positions=16, **factors))
    check_context(64, model, "the longest row", "data.max_length")
    with pytest.raises(ConfigError, match="the longest row comes to 65 tokens but the model's context is 64"):
        check_context(65, model, "the longest row", "data.max_length")
    short = for_length(model, 9)
    check_context(16, short, "the longest row", "data.max_length")
    with pytest.raises(ConfigError, match="17 tokens but the rotary embeddings of this run are those for up to 16"):
        check_context(17, short, "the longest row", "data.max_length")
    assert for_length(model, 17) == for_length(model, 64), "one program for all longer runs"
