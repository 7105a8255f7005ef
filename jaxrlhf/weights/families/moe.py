"""Shared by the families with mixtures of experts: the router's options in config.json and the tensors' names."""

import re
from dataclasses import replace
from typing import Any

from jaxrlhf.weights.families.base import Key, TensorNames
from jaxrlhf.weights.fields import Fields

KEYS = {
    "experts_per_token": Key("num_experts_per_tok", Fields.integer, 8),
    "normalise_expert_shares": Key("norm_topk_prob", Fields.boolean, False),
}
_MODULES = {
    "experts/router": "mlp.gate",
    "experts/gate": "mlp.experts.{}.gate_proj",
    "experts/up": "mlp.experts.{}.up_proj",
    "experts/down": "mlp.experts.{}.down_proj",
}
# of other routers: transformers would ignore them here, but a file that has them means another model
_SHARED = ("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size", "shared_intermediate_size")
_ROUTING = re.compile("rout|gating|expert|topk|moe|n_group|score_correction")
_KNOWN = {  # every other key with such a name describes another router
    "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size",
    "output_router_logits", "router_aux_loss_coef",
}  # fmt: skip


def with_experts(tensors: TensorNames) -> TensorNames:
    """The names of a family whose layers have experts in place of an MLP."""
    kept = {module: name for module, name in tensors.modules.items() if not module.startswith("mlp/")}
    return replace(tensors, modules=kept | _MODULES)


def parse_router(fields: Fields, values: dict[str, Any], default: int, coef: float) -> dict[str, Any]:
    """The number of experts, and the coefficient of the load-balancing loss, 0 unless the file asks for that loss; of
    both the defaults are given. Raises DataError for another kind of router."""
    for key in _SHARED:
        fields.refuse_if_set(key, "shared experts are not implemented")
    for key in sorted(key for key in fields.values if _ROUTING.search(key) and key not in _KNOWN):
        fields.refuse_if_set(key, "only a router that takes the top experts of a softmax is implemented")
    fields.choice("scoring_func", ("softmax",))
    fields.refuse_if_set("mlp_only_layers", "only models with experts in every layer are supported")
    if fields.integer("decoder_sparse_step", 1) != 1:
        fields.refuse("decoder_sparse_step", "1: only models with experts in every layer are supported")
    key = "num_local_experts" if fields.has("num_local_experts") else "num_experts"
    count = fields.integer(key, default)
    if values["experts_per_token"] > count:
        fields.refuse("num_experts_per_tok", f"at most {key} ({count})")
    balanced = fields.boolean("output_router_logits", False)
    coef = fields.number("router_aux_loss_coef", coef, least=0.0) if balanced else 0.0
    return {"num_experts": count, "router_aux_loss_coef": coef}
