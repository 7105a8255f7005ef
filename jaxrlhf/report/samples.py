"""Samples of a run by prompt, cut to what a page can hold."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrlhf.report import curves, tokens

LONGEST_TEXT = 4000
"""Characters of a prompt or completion on the page."""
ALL_TEXTS = 250_000
"""Characters of all samples together."""
STEPS = 12  # steps whose samples are shown


def by_prompt(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Samples by prompt: {"steps": [...], "fixed": [...], "others": [...]}.

    A prompt of "fixed" was sampled at several steps: {"prompt", "held_out", "answers": {step: [completion, score]}}. If
    it was sampled several times at one step, each time makes a row. Where some of them were sampled at the first step
    of all, the others, which came back by chance, are left out. "others" are the samples of prompts that did not come
    back, of the first and the last step.
    """
    grouped: dict[tuple[str, bool, int], dict[int, tuple[str, float | None]]] = {}
    times: dict[tuple[str, bool, int], int] = {}
    for row in rows:
        key = str(row.get("prompt", "")), bool(row.get("held_out")), row["step"]
        times[key] = times.get(key, -1) + 1
        score = row.get("score")
        answer = str(row.get("completion", "")), curves.rounded(score) if isinstance(score, float | int) else None
        grouped.setdefault((key[0], key[1], times[key]), {})[row["step"]] = answer
    several = {key: answers for key, answers in grouped.items() if len(answers) > 1}
    start = min((row["step"] for row in rows), default=0)
    several = {key: answers for key, answers in several.items() if start in answers} or several
    steps = sorted({step for answers in several.values() for step in answers})
    shown = {steps[i] for i in tokens.spread(len(steps), STEPS)}
    budget, fixed = ALL_TEXTS, []
    for (prompt, held_out, _), answers in several.items():
        kept = {step: [cut(text), score] for step, (text, score) in sorted(answers.items())}
        ends = (min(kept), max(kept))
        kept = {step: answer for step, answer in kept.items() if step in shown or step in ends}
        budget -= sum(len(answer[0]) for answer in kept.values()) + min(len(prompt), LONGEST_TEXT)
        if budget < 0 and fixed:
            break
        fixed.append({"prompt": cut(prompt), "held_out": held_out, "answers": kept})
    single = [(*key, *next(iter(answers.items()))) for key, answers in grouped.items() if len(answers) == 1]
    ends = {step for *_, step, _ in single}
    ends = {min(ends), max(ends)} if ends and not fixed else set()
    others = [
        {"step": step, "prompt": cut(prompt), "completion": cut(answer[0]), "score": answer[1]}
        for prompt, _, _, step, answer in single
        if step in ends
    ]
    return {"fixed": fixed, "left_out": len(several) - len(fixed), "others": others[: STEPS * 2]}


def cut(content: Any) -> str:
    """The text, cut to LONGEST_TEXT characters with the number of those left out."""
    content = str(content)
    left = len(content) - LONGEST_TEXT
    return f"{content[:LONGEST_TEXT]} ... ({left:,} more characters)" if left > 0 else content
