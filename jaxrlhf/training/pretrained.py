"""A model of a run in Hugging Face layout, as `save_pretrained` and `jaxrlhf export` write it."""

import dataclasses
from pathlib import Path

from jaxrlhf import weights
from jaxrlhf.config import RewardConfig
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.models import ModelConfig, with_two_labels
from jaxrlhf.training.setup import RunConfig
from jaxrlhf.types import Params


def save(
    directory: str | Path,
    model: ModelConfig,
    params: Params,
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    step: int,
    results: dict[str, float],
    merge_lora: bool = False,
) -> Path:
    """Write a model of a run in Hugging Face layout, with a model card.

    Of a run with adapters only those are written, in PEFT's layout, unless they are to be merged or would not be enough
    (see `_base_model`). A classifier gets two labels, so that its score is the probability of the good one.
    """
    if isinstance(config, RewardConfig) and config.loss == "classification" and model.num_labels == 1:
        model, params = with_two_labels(model, params)
    card = {
        "method": config.method,
        "base_model": config.model.path,
        "dataset": config.data.path,
        "steps": step,
        "config": dataclasses.asdict(config),
        "metrics": {k: v for k, v in results.items() if not k.startswith("perf/")},
    }
    source, _ = weights.base_and_adapters(weights.resolve(config.model.path, config.model.revision, weights=False))
    stops = () if isinstance(config, RewardConfig) else config.sampling.stop_token_ids
    base = None if merge_lora else _base_model(config, model)
    return weights.export(
        directory, model, params, source=source, tokenizer=tokenizer, stops=stops, facts=card, base=base
    )


def _base_model(config: RunConfig, model: ModelConfig) -> tuple[str, str | None] | None:
    """The path and revision of the model that the adapters of a run belong to.

    None if there is no such model: random weights, merged adapters that were not written to a folder, an embedding that
    grew for new tokens, a head that PEFT does not know.
    """
    source = config.model
    folder = weights.resolve(source.path, source.revision, weights=False)
    merged = weights.base_and_adapters(folder)[1] is not None
    rows = weights.load_config(source.path, revision=source.revision).vocab_size
    if source.init == "random" or model.vocab_size > rows or model.head == "mlp" or (merged and not source.merged_path):
        return None
    path = Path(source.merged_path if merged else source.path).expanduser()
    if path.is_dir():
        return str((path if merged else folder).resolve()), None
    return source.path.removeprefix("hf://"), source.revision
