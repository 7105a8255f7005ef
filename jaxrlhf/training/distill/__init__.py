"""Distillation: `trainer` is the loop, `update` is the jitted step."""
