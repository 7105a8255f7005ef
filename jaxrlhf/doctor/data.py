"""Report on a data file: its columns, how each method reads it, and its first row. Command `jaxrlhf data`."""

import itertools
from collections.abc import Sequence

from jaxrlhf import weights
from jaxrlhf.config import SFTConfig
from jaxrlhf.data import datasets, formats, sources
from jaxrlhf.data.examples import Example
from jaxrlhf.data.tokenise import TokenisedExample
from jaxrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jaxrlhf.errors import DataError, quoted

METHODS: dict[formats.Task, str] = {
    "sft": "sft",
    "pairs": "reward, dpo",
    "prompts": "ppo, grpo",
    "labels": "reward --loss classification, dpo --dpo.loss kto",
    "scores": "reward --loss regression",
    "rankings": "reward --loss ranking",
}
COMMON: tuple[formats.Task, ...] = ("sft", "pairs", "prompts")  # the others are listed only if they can be read


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
            if (readable or task not in COMMON) and not formats.can_read(rows, task, config.data):
                if task in COMMON:
                    lines.append(f"jaxrlhf {methods}: no, it has no columns of {formats.TASK_NAMES[task]}")
                continue
            found = formats.recognise(rows, task, config.data)
        except DataError as error:
            lines.append(f"jaxrlhf {methods}: no. {error}")
            continue
        unused = found.unused(rows)
        lines.append(f"jaxrlhf {methods}: {found}" + (f"; columns not used: {', '.join(unused)}" if unused else ""))
        readable.append(task)
    first = "\n".join(f"  {name}: {quoted(value, 200)}" for name, value in rows.rows[0].items())
    lines.append(f"first row:\n{first}")
    path = config.tokenizer.path or config.model.path
    if not path:
        return "\n".join(
            [*lines, "add --model.path DIR or --tokenizer.path DIR to see lengths in tokens and the tokens trained on"]
        )
    tokenizer = load_tokenizer(weights.resolve(path, weights=False), config.tokenizer)
    for task in readable:
        try:
            report, texts = first_row(task, config, tokenizer)
        except DataError as error:
            lines.append(f"\njaxrlhf {METHODS[task]}: no. {error}")
            continue
        lines.append(f"\njaxrlhf {METHODS[task]}: {report}\nfirst row, tokens trained on in [[ ]]")
        lines += [f"{name}:\n{text}" for name, text in texts]
    return "\n".join(lines)


def first_row(
    task: formats.Task, config: SFTConfig, tokenizer: Tokenizer
) -> tuple[datasets.Report, list[tuple[str, str]]]:
    """Load data for `task`: the report, and the names and texts of the first row, with the tokens trained on between
    [[ and ]]. Raises DataError and ConfigError."""

    def make_row(
        tokens: TokenisedExample, example: Example, rows: sources.Rows, i: int
    ) -> list[tuple[str, Sequence[int], Sequence[bool]]]:
        match task:
            case "prompts":
                return [("prompt", tokens.prompt, [False] * len(tokens.prompt))]
            case "sft":
                return [("sequence", *tokens.sequence(0, all_tokens=not config.completion_only))]
            case "pairs":
                names = ["chosen", "rejected"]
            case "rankings":
                names = [f"rank {k}" for k in range(1, len(tokens.completions) + 1)]
            case "labels":
                names = ["good" if example.scores[0] else "bad"]
            case "scores":
                names = [f"score {example.scores[0]:g}"]
        return [(name, *tokens.sequence(k)) for k, name in enumerate(names)]

    split = datasets.train_validation_split(config.data, tokenizer, task, make_row)
    return split.report, [(name, _marked(tokens, mask, tokenizer)) for name, tokens, mask in split.train[0]]


def _marked(tokens: Sequence[int], loss_mask: Sequence[bool], tokenizer: Tokenizer) -> str:
    """Text of a row, with its control tokens; tokens trained on are between [[ and ]]."""
    control = {*tokenizer.control_tokens.values()}
    kinds = [(trained, token in control) for token, trained in zip(tokens, loss_mask, strict=True)]
    text, start, inside = "", 0, False
    for (trained, is_control), run in itertools.groupby(kinds):
        end = start + len(list(run))
        part = tokens[start:end]
        if trained != inside:
            text += "[[" if trained else "]]"
        text += "".join(tokenizer.convert_ids_to_tokens(part)) if is_control else tokenizer.decode(part, tokens[:start])
        start, inside = end, trained
    return text + ("]]" if inside else "")
