"""Rewards: models, functions, servers and people, their weighted sum, and functions to use as they are."""
