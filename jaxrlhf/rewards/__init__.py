"""Rewards: functions that people write, reward models, and their weighted sum."""
