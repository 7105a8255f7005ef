"""Statistics of the reward of a run: histograms of scores, components, correlations with length and KL."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrlhf.metrics.columns import Columns
from jaxrlhf.metrics.keys import REWARDS
from jaxrlhf.metrics.statistics import correlation
from jaxrlhf.report import curves, verdict

BINS = 20


def score_histogram(
    samples: Sequence[Mapping[str, Any]], token_records: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Histograms of early and late scores, of what has most of them: held-out prompts at the first and last step, or
    samples of training or recorded sequences in the first and last third of their steps."""
    sources = {
        "held-out prompts": [row for row in samples if row.get("held_out")],
        "samples": [row for row in samples if not row.get("held_out")],
        "recorded sequences": token_records,
    }
    scores = {
        name: [(row["step"], row["score"]) for row in rows if curves.is_finite(row.get("score"))]
        for name, rows in sources.items()
    }
    of, rows = max(scores.items(), key=lambda item: len(item[1]))
    steps = sorted({step for step, _ in rows})
    if len(steps) < 2:
        return None
    part = 1 if of == "held-out prompts" else max(1, len(steps) // 3)
    ends = steps[:part], steps[-part:]
    groups = [[score for step, score in rows if step in end] for end in ends]
    edges = np.histogram_bin_edges(np.concatenate(groups), BINS)
    names = [f"step {end[0]}" if len(end) == 1 else f"steps {end[0]} to {end[-1]}" for end in ends]
    return {
        "of": of,
        "edges": [curves.rounded(float(edge)) for edge in edges],
        "series": [
            {"label": f"{name} ({len(group)})", "counts": np.histogram(group, edges)[0].tolist()}
            for name, group in zip(names, groups, strict=True)
        ],
    }


def components(records: Columns) -> list[dict[str, Any]]:
    """A row for each component of the score: first and last mean, and what was unscored, cut or failed."""
    keys = [key for key in records.metrics if key.startswith(REWARDS) and key.endswith("/errors")]
    rows = []
    for name in sorted(key.split("/")[1] for key in keys):

        def values(part: str, suffix: str = "", name: str = name) -> np.ndarray:
            return records.arrays(f"{REWARDS}{name}{suffix}/{part}")[1]

        def last(*key: str) -> float | int | None:
            found = values(*key)
            found = found[-verdict.window(len(found)) :]
            return curves.rounded(float(np.mean(found))) if found.size else None

        means, errors = values("mean"), values("errors")
        rows.append(
            {
                "name": name,
                "first": curves.rounded(means[0].item()) if means.size else None,
                "last": last("mean"),
                "std": last("std"),
                "length": last("length_correlation"),
                "unanswered": last("mean", "_unanswered"),
                "truncated": last("mean", "_truncated"),
                "errors": int(errors[np.isfinite(errors)].sum()),
            }
        )
    return rows


def correlations(records: Columns, token_records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Correlations of score with length and KL: [{"name", "value", "count", "of"}]."""
    found = []
    scored = [r for r in token_records if isinstance(r.get("score"), float | int)]
    score = np.array([r["score"] for r in scored], np.float64)
    for name, of in (("length", lambda r: len(r["pieces"])), ("KL", lambda r: sum(v or 0 for v in r["kl"]))):
        if len(scored) > 3 and (name == "length" or all(isinstance(r.get("kl"), list) for r in scored)):
            value = correlation(score, np.array([of(r) for r in scored], np.float64))
            found.append({"name": name, "value": value, "count": len(scored), "of": "recorded sequences"})
    for name, key in (("length", "tokens/mean_length"), ("KL", "objective/kl")):
        rows = np.array(records.arrays("objective/scores", key)[1:], np.float64)
        rows = rows[:, np.isfinite(rows).all(axis=0)]
        if rows.shape[1] > 3:
            scores, others = rows
            found.append(
                {"name": f"mean {name}", "value": correlation(scores, others), "count": len(scores), "of": "updates"}
            )
    return found
