"""Distillation: `trainer` is the loop, `teacher` loads the teacher, `update` is the jitted step."""
