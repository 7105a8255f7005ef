"""The keys of adapter_config.json: used, without effect on the outputs, or refused.

Together the three tables hold every key of `peft.LoraConfig` in PEFT 0.21 (a parity test compares them).
"""

from jaxrlhf.errors import DataError
from jaxrlhf.weights.fields import Fields

USED = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "use_dora", "bias", "modules_to_save", "trainable_token_indices", "init_lora_weights",
    "target_parameters",
}  # fmt: skip

WITHOUT_EFFECT = {
    # the tensors of the file say which matrices have adapters
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    # settings of an `init_lora_weights`, which decides alone
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    # in training only: noise, and what is kept for the backward pass
    "lora_dropout", "velora_config", "monteclora_config",
    # A and B are stored as [r, in] and [out, r] whatever the layout of the base matrix
    "fan_in_fan_out",
    # of other keys: the group size of `use_qalora`, the module of `megatron_config`, the sharing of tied tables
    "qalora_group_size", "megatron_core", "ensure_weight_tying",
    "inference_mode", "auto_mapping", "peft_version", "runtime_config", "merge_weights",
}  # fmt: skip

MERGE = "merge the adapters in PEFT (model.merge_and_unload().save_pretrained(FOLDER)) and use that folder"
_REWRITTEN_BASE = (
    "this initialisation also changed the base model's weights; save the adapters with PEFT's save_pretrained(..., "
    "path_initial_model_for_weight_conversion=INITIAL_ADAPTERS), which writes plain LoRA for the unchanged base model, "
    "or merge them in the process that trained them"
)
_PLAIN = "such adapters cannot be merged either; train plain LoRA"

REFUSED = {
    "use_qalora": f"it needs a GPTQ base model; {_PLAIN}",
    "alora_invocation_tokens": f"the adapters act only from these tokens on; {_PLAIN}",
    "arrow_config": f"a router chooses between adapters for every token; {_PLAIN}",
    "layer_replication": f"the model repeats layers of its base model; {MERGE}",
    "lora_bias": f"{MERGE} (PEFT can where the matrices have biases)",
    "use_bdlora": MERGE,
    "kasa_config": f"the base model's weights are truncated too; {MERGE}",
    "megatron_config": "export the adapters with the tensor names of transformers",
    "enable_lora": f"it is of PEFT 0.2 and earlier; {MERGE} with that version",
}

_TASKS = ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")
_INITS = ("gaussian", "eva", "orthogonal", "mica")  # the base model's weights stay as they are
_REWRITING_INITS = ("pissa", "olora", "corda", "lora_ga")
_HEADS = {"score", "classifier"}  # PEFT adds both names for SEQ_CLS; only `score` exists in the supported families


def check(fields: Fields) -> None:
    """Raise DataError for every value that changes the outputs and is not implemented, with a remedy.

    A key in none of the tables is refused unless its value is null, false, 0 or empty, as the switches of PEFT's
    methods are by default.
    """
    values = fields.values
    kind = values.get("peft_type")
    if kind != "LORA":
        fields.refuse("peft_type", f"'LORA': adapters of another type cannot be read; if they can be merged, {MERGE}")
    if values.get("bias", "none") != "none":
        fields.refuse("bias", f"'none': trained biases are not supported; {MERGE}")
    fields.choice("task_type", _TASKS)
    _check_init(fields)
    if others := sorted(set(fields.strings("modules_to_save")) - _HEADS):
        fields.refuse("modules_to_save", f"at most ['score']; {', '.join(others)} cannot be read: {MERGE}")
    for key, value in values.items():
        if key in REFUSED:
            fields.refuse_if_set(key, REFUSED[key])
        elif key not in USED | WITHOUT_EFFECT and value:
            raise DataError(
                f"{fields.where}: {key} is {value!r}, a key that jaxrlhf does not know (it knows those of PEFT 0.21); "
                f"if it changes nothing in the model's outputs, remove it from the file, else {MERGE}"
            )


def _check_init(fields: Fields) -> None:
    """Refuse an `init_lora_weights` by which the adapters belong to other weights than those of the base model."""
    value = fields.values.get("init_lora_weights")
    name = value.lower() if isinstance(value, str) else ""
    if name.startswith(_REWRITING_INITS):
        fields.refuse_if_set("init_lora_weights", _REWRITTEN_BASE)
    if name == "loftq":
        fields.refuse_if_set("init_lora_weights", f"the adapters belong to a quantised base model; {MERGE}")
    if value is not None and not isinstance(value, bool) and name not in _INITS:
        fields.refuse("init_lora_weights", f"true, false or one of {', '.join(_INITS)}")
