"""Report on a data file: its columns, how each method reads it, what is learnt, and what is suspicious in it. Command
`jaxrlhf data`."""

from collections.abc import Sequence
from dataclasses import replace

from jaxrlhf import weights
from jaxrlhf.config import SFTConfig
from jaxrlhf.data import datasets, formats, sources
from jaxrlhf.data.examples import Example
from jaxrlhf.data.tokenise import TokenisedExample
from jaxrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jaxrlhf.doctor import loss_mask
from jaxrlhf.doctor import rows as checks
from jaxrlhf.doctor.rows import Sequences, TokenisedRow
from jaxrlhf.errors import DataError, quoted, visible

METHODS: dict[formats.Task, str] = {
    "sft": "sft",
    "pairs": "reward, dpo",
    "prompts": "ppo, grpo, distill --distill.lmbda 1",
    "labels": "reward --loss classification, dpo --dpo.loss kto",
    "scores": "reward --loss regression",
    "rankings": "reward --loss ranking",
}
COMMON: tuple[formats.Task, ...] = ("sft", "pairs", "prompts")  # the others are listed only if they can be read


def examine_data(config: SFTConfig, *, colour: bool = False, ids: bool = False) -> str:
    """Describe a data file, or each of a mixture; with a tokenizer also its lengths in tokens and the first row with
    what is learnt marked, by `colour` or brackets, and with `ids` token by token.

    Raises:
        DataError: a file cannot be read.
    """
    data = config.data
    parts = [_examine(replace(config, data=source), colour=colour, ids=ids) for source in data.sources or (data,)]
    return "\n\n".join([*parts, *([_mixture(config)] if data.mix else [])])


def _mixture(config: SFTConfig) -> str:
    """Describe a mixture: the trainers that can read it, and the shares of its data sets."""
    path = config.tokenizer.path or config.model.path
    if not path:
        return "the shares of the mixture are left out without a tokenizer: they count the rows that can be used"
    tokenizer, lines = load_tokenizer(weights.resolve(path, weights=False), config.tokenizer), []
    for task in COMMON:
        try:
            text = str(replace(tokenised_rows(task, config, tokenizer)[0], parts=[]))
        except DataError as error:
            text = f"no. {error}"
        lines.append(f"jaxrlhf {METHODS[task]}: {text}".replace("\n", "\n    "))
    return "\n".join(lines)


def _examine(config: SFTConfig, *, colour: bool, ids: bool) -> str:
    rows = sources.read_rows(config.data)
    count = f"{len(rows.rows):,} row{'s' if len(rows.rows) != 1 else ''}"
    lines = [visible(f"data {rows.source}: {count} with columns {', '.join(rows.columns)}")]
    found: dict[formats.Task, formats.Format] = {}
    for task, methods in METHODS.items():
        try:
            if (found or task not in COMMON) and not formats.can_read(rows, task, config.data):
                if task in COMMON:
                    lines.append(f"jaxrlhf {methods}: no, it has no columns of {formats.TASK_NAMES[task]}")
                continue
            read_as = formats.recognise(rows, task, config.data)
        except DataError as error:
            lines.append(f"jaxrlhf {methods}: no. {error}".replace("\n", "\n    "))
            continue
        unused = read_as.unused(rows)
        left_out = f"; columns not used: {', '.join(unused)}" if unused else ""
        lines.append(visible(f"jaxrlhf {methods}: {read_as}{left_out}"))
        found[task] = read_as
    first = "\n".join(f"  {visible(name)}: {quoted(value, 200)}" for name, value in rows.rows[0].items())
    lines += [f"first row:\n{first}", *_texts(rows, found, config)]
    path = config.tokenizer.path or config.model.path
    if not path:
        left_out = "tokens, lengths in tokens, truncation, held-out rows, and the tokens trained on"
        lines.append(f"left out without a tokenizer: {left_out}. Add --model DIR or --tokenizer DIR")
        return "\n".join(lines)
    tokenizer = load_tokenizer(weights.resolve(path, weights=False), config.tokenizer)
    for task in found:
        lines += _tokens(task, config, tokenizer, colour=colour, ids=ids)
    return "\n".join(lines)


def _texts(rows: sources.Rows, found: dict[formats.Task, formats.Format], config: SFTConfig) -> list[str]:
    """Duplicates, lengths in characters and warnings: what needs no tokenizer."""
    examples, warnings = {}, {}
    for task, read_as in found.items():
        try:
            examples[task] = checks.read_examples(rows, read_as, config.data)
        except DataError as error:
            warnings[f"jaxrlhf {METHODS[task]}: {error}"] = None
    usable = [read for read in examples.values() if read]
    lines = []
    if usable:
        lines = [*checks.duplicates(rows, usable[0]), checks.summary(checks.character_lengths(usable[0]), "characters")]
    for task, read in examples.items():
        if task == "prompts" and len(examples) > 1:  # what is suspicious in its prompts is so for the other tasks
            continue
        warnings |= dict.fromkeys(checks.warnings(task, read))
    return [*lines, *(f"warning: {visible(text)}" for text in warnings)]


def _tokens(task: formats.Task, config: SFTConfig, tokenizer: Tokenizer, *, colour: bool, ids: bool) -> list[str]:
    """The data as a trainer reads it: report, lengths, warnings, and the first row with the learnt tokens marked."""
    try:
        report, rows = tokenised_rows(task, config, tokenizer)
    except DataError as error:
        return [f"\njaxrlhf {METHODS[task]}: no. {error}"]
    lines = [visible(f"\njaxrlhf {METHODS[task]}: {report}"), *checks.histogram(report.lengths)]
    warnings = checks.token_warnings(rows, tokenizer, learns=task != "prompts")
    lines += [f"warning: {visible(text)}" for text in warnings]
    learnt = "" if task == "prompts" else f", {loss_mask.legend(colour)}"  # of prompts nothing is learnt
    lines.append(f"first row{learnt}:")
    for name, tokens, mask in rows[0].sequences:
        lines += [f"{name}:", loss_mask.marked(tokens, mask, tokenizer, colour=colour)]
        lines += loss_mask.token_lines(tokens, mask, tokenizer, colour=colour) if ids else []
    return lines


def tokenised_rows(
    task: formats.Task, config: SFTConfig, tokenizer: Tokenizer
) -> tuple[datasets.Report, Sequence[TokenisedRow]]:
    """Load data for `task`: the report and the rows to train on. Raises DataError and ConfigError."""

    def make_row(tokens: TokenisedExample, example: Example, rows: sources.Rows, i: int) -> TokenisedRow:
        return TokenisedRow(rows.locations[i].short, example, sequences(tokens, example))

    def sequences(tokens: TokenisedExample, example: Example) -> Sequences:
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
    return split.report, split.train
