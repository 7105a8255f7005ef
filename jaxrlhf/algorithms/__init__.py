"""Losses and estimators: arrays and masks in, `(scalar, metrics)` out. No model, no tokenizer, no run config.

Every loss and metric is a sum over what counts, divided by `count`: the number of real tokens (or pairs) of the whole
optimizer batch. Micro-batches of any size therefore add up to the loss, the gradient and the metrics of the batch.
"""
