"""Report on a data file: its columns, the format each method would use, and its first row. Command `jaxrlhf data`."""

import contextlib

from jaxrlhf import weights
from jaxrlhf.config import SFTConfig
from jaxrlhf.data import datasets, formats, sources
from jaxrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jaxrlhf.errors import DataError, quoted

METHODS: dict[formats.Task, str] = {"sft": "sft", "pairs": "reward, dpo", "prompts": "ppo, grpo"}
LABELLED: dict[formats.Task, str] = {
    "labels": "classification, dpo --dpo.loss kto",
    "scores": "regression",
    "rankings": "ranking",
}


def examine_data(config: SFTConfig) -> str:
    """Describe a data file; with a tokenizer also count tokens and show the first row tokenized.

    Raises:
        DataError: the file cannot be read.
    """
    rows = sources.read_rows(config.data)
    lines = [f"data {rows.source}: {len(rows.rows):,} rows with columns {', '.join(rows.columns)}"]
    readable: list[formats.Task] = []
    for task, methods in METHODS.items():
        try:
            lines.append(f"jaxrlhf {methods}: {_described(rows, task, config)}")
            readable.append(task)
        except DataError as error:
            lines.append(f"jaxrlhf {methods}: no. {error}")
    for task, loss in LABELLED.items():
        with contextlib.suppress(DataError):  # rare formats are listed only if they match
            lines.append(f"jaxrlhf reward --loss {loss}: {_described(rows, task, config)}")
    first = "\n".join(f"  {name}: {quoted(value, 200)}" for name, value in rows.rows[0].items())
    lines.append(f"first row:\n{first}")
    path = config.tokenizer.path or config.model.path
    if not path:
        return "\n".join(
            [*lines, "add --model.path DIR or --tokenizer.path DIR to see lengths in tokens and the tokens trained on"]
        )
    tokenizer = load_tokenizer(weights.resolve(path, weights=False), config.tokenizer)
    for task in readable:
        lines += ["", _tokenized(task, config, tokenizer)]
    return "\n".join(lines)


def _described(rows: sources.Rows, task: formats.Task, config: SFTConfig) -> str:
    found = formats.recognise(rows, task, config.data)
    unused = found.unused(rows)
    return f"{found}; columns not used: {', '.join(unused)}" if unused else str(found)


def _tokenized(task: formats.Task, config: SFTConfig, tokenizer: Tokenizer) -> str:
    if task == "sft":
        split = datasets.sft_rows(config.data, tokenizer, config.completion_only)
        return f"{split.report}\nfirst row, tokens trained on in [[ ]]:\n{_marked(split.train[0], tokenizer)}"
    if task == "pairs":
        pairs = datasets.pair_rows(config.data, tokenizer)
        chosen, rejected = (_marked(row, tokenizer) for row in (pairs.train[0].chosen, pairs.train[0].rejected))
        return f"{pairs.report}\nfirst pair, chosen:\n{chosen}\nrejected:\n{rejected}"
    prompts = datasets.prompt_rows(config.data, tokenizer)
    return f"{prompts.report}\nfirst prompt:\n{''.join(tokenizer.convert_ids_to_tokens(prompts.train[0].tokens))}"


def _marked(row: datasets.SFTRow, tokenizer: Tokenizer) -> str:
    """Text of a row with the tokens trained on between [[ and ]]."""
    text, inside = "", False
    for piece, trained in zip(tokenizer.convert_ids_to_tokens(row.tokens), row.loss_mask, strict=True):
        if trained != inside:
            text += "[[" if trained else "]]"
        text, inside = text + piece, trained
    return text + ("]]" if inside else "")
