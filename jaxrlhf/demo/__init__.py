"""The RLHF pipeline in miniature, on a synthetic task with a known ground truth, and generators of arithmetic tasks."""
