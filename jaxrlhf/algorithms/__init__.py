"""Losses and advantage estimators as pure functions of arrays and masks. No model, no tokenizer, no run config.

Losses return `(scalar, metrics)`. Every loss and metric is a masked sum divided by `count`, the number of real tokens
(or pairs) of the whole optimizer batch. Micro-batches of any size therefore add up to the loss, the gradient and the
metrics of the batch. Shapes are checked when a function is traced (AssertionError): those of a mask and of what it
selects by `masked.keep`, others by the function itself.
"""
