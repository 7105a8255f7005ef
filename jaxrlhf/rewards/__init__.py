"""Rewards: weighted sums of reward models, functions, endpoints and people, and ready-made reward functions."""
