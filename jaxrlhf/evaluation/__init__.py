"""Evaluation of trained models.

`completions` samples and scores completions of prompts, `summary` aggregates and prints them, `text_metrics` compares
texts with references, `reward_examples` and `reward_metrics` evaluate reward models on held-out rows.
"""
