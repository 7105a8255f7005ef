"""Granite 3: Llama with multipliers on the embedding, the attention logits and the outputs of attention and MLP, and a
divisor of the logits. transformers has no class for reward models of this family.
"""

from jaxrlhf.weights.families import llama
from jaxrlhf.weights.families.base import Family, Key
from jaxrlhf.weights.fields import Fields

_MULTIPLIERS = {
    "embedding_multiplier": Key("embedding_multiplier", Fields.number, 1.0),
    "attention_scale": Key("attention_multiplier", Fields.number, 1.0),
    "residual_multiplier": Key("residual_multiplier", Fields.number, 1.0),
    "logits_divisor": Key("logits_scaling", Fields.number, 1.0),
}
_KEYS = llama.keys(positions=2048) | llama.BIASES | llama.MLP_BIAS | _MULTIPLIERS

FAMILIES = {
    "granite": Family("Granite", _KEYS, llama.FIXED, llama.parse, llama.render, llama.TENSORS, has_classifier=False)
}
