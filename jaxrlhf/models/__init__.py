"""The decoder and its heads. A model is a frozen `ModelConfig` and its parameters, a plain nested dict of arrays."""

from jaxrlhf.models.attention import cudnn_trouble
from jaxrlhf.models.config import Adapters, DeltaNet, ModelConfig, Rope
from jaxrlhf.models.heads import (
    finish_logits,
    init_head,
    label_logits,
    lm_logits,
    lm_weight,
    log_odds,
    scalar_head,
    with_two_labels,
)
from jaxrlhf.models.packed import Bits, pack, unpack
from jaxrlhf.models.placement import place, row_axes
from jaxrlhf.models.rope import for_length
from jaxrlhf.models.transformer import (
    adapters_of_all_layers,
    empty_cache,
    forward,
    forward_cached,
    forward_with_router,
    init,
    layer_of,
    unstack,
)
