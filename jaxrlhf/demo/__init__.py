"""The whole pipeline in miniature, on a task whose truth is known."""
