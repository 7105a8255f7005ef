"""A model of a run in Hugging Face layout, as `save_pretrained` and `jaxrlhf export` write it."""

from pathlib import Path

from jaxrlhf import weights
from jaxrlhf.config import RewardConfig, TokenizerSource
from jaxrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jaxrlhf.files import read_json
from jaxrlhf.models import ModelConfig, with_two_labels
from jaxrlhf.training import facts
from jaxrlhf.training.setup import RunConfig
from jaxrlhf.types import Params
from jaxrlhf.weights.hub import CONFIG


def save(
    directory: str | Path,
    model: ModelConfig,
    params: Params,
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    step: int,
    results: dict[str, float],
    origin: facts.Origin | None = None,
    merge_lora: bool = False,
) -> Path:
    """Write a model of a run in Hugging Face layout, with a model card (see `facts.of_export`).

    Of a run with adapters only those are written, in PEFT's layout, unless they are to be merged or would not be enough
    (see `_base_model`). A classifier gets two labels, so that its score is the probability of the good one. A reward
    model gets a pad token that ends no text, if possible (see `padding_note`), and no chat template if `data.template`
    made plain text of its rows: it is given prompts to score as it was trained.
    """
    if isinstance(config, RewardConfig) and config.loss == "classification" and model.num_labels == 1:
        model, params = with_two_labels(model, params)
    if (
        isinstance(config, RewardConfig)
        and any(source.template for source in config.data.sources)
        and tokenizer.has_chat
    ):
        tokenizer = tokenizer.without_chat_template()
    base = _base_model(config, model) if "lora" in params and not merge_lora else None
    if config.tokenizer.pad_token is None:
        model, params, tokenizer = with_pad_token(model, params, tokenizer, may_grow=base is None)
    source, _ = weights.base_and_adapters(weights.resolve(config.model.path, config.model.revision, weights=False))
    stops: tuple[int, ...] = ()
    if not isinstance(config, RewardConfig):
        stops = (*config.sampling.stop_token_ids, *tokenizer.stops(config.sampling.stop_strings))
    return weights.export(
        directory,
        model,
        params,
        source=source,
        tokenizer=tokenizer,
        stops=stops,
        facts=facts.of_export(config, step, results, origin),
        base=base,
    )


def with_pad_token(
    model: ModelConfig, params: Params, tokenizer: Tokenizer, *, may_grow: bool
) -> tuple[ModelConfig, Params, Tokenizer]:
    """A reward model whose tokenizer has a pad token that ends no text, so that transformers reads the score at the
    last token too (see `Tokenizer.with_pad_token`). A language model is returned as it is.

    The embedding gets a row for a new token if it `may_grow` and transformers knows the head. No score changes.
    """
    if model.head == "lm":
        return model, params, tokenizer
    tokenizer = tokenizer.with_pad_token(None if may_grow and model.head == "linear" else model.vocab_size)
    return *weights.resize_embeddings(model, params, max(tokenizer.size, model.vocab_size)), tokenizer


def padding_note(folder: Path) -> str | None:
    """Why transformers scores texts otherwise than jaxrlhf with the reward model in `folder`, and what to do; None if
    the scores are equal, or if it is a language model or has a head that transformers does not know."""
    if weights.load_config(folder).head != "linear":
        return None
    base, adapters = weights.base_and_adapters(folder)
    tokenizer = load_tokenizer(weights.tokenizer_folder(folder), TokenizerSource())
    pad = read_json(base / CONFIG).get("pad_token_id")
    if tokenizer.pad_id in tokenizer.end_ids:
        return (
            "transformers reads the score of this reward model before the end token, jaxrlhf reads it at the end "
            "token, because its padding token is an end token and "
            + (
                "the base model has no row for another: export it with --merge-lora, which adds one"
                if adapters
                else "tokenizer.pad_token says so: leave that out"
            )
        )
    if pad != tokenizer.pad_id:
        return (
            f"for the scores of jaxrlhf in transformers, set config.pad_token_id of the base model to "
            f"{tokenizer.pad_id} before batches are scored; in its config.json it is {pad}"
        )
    return None


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
