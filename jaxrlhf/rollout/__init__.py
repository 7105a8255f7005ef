"""Sampling responses from a policy."""

from jaxrlhf.rollout.decode import generate
