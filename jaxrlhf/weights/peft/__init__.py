"""LoRA and DoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors."""

from jaxrlhf.weights.peft.experts import of_experts
from jaxrlhf.weights.peft.layout import CONFIG, WEIGHTS, base_of, is_adapter, modules, num_labels
from jaxrlhf.weights.peft.reading import read
from jaxrlhf.weights.peft.writing import write

__all__ = ["CONFIG", "WEIGHTS", "base_of", "is_adapter", "modules", "num_labels", "of_experts", "read", "write"]
