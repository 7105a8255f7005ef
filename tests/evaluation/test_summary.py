"""Statistics and model comparison, against independent formulas."""

import math
import statistics as stdlib

import numpy as np
import pytest

from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluation import summary, text_metrics
from jaxrlhf.metrics.statistics import mean_and_error, wilson


def test_mean_and_error_against_the_standard_library():
    values = [1.0, 4.0, -2.0, 7.5]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(stdlib.fmean(values))
    assert error == pytest.approx(stdlib.stdev(values) / 2)
    assert mean_and_error([3.0]) == (3.0, 0.0)


def test_wilson_bounds_solve_the_score_equation():
    for successes, total in [(0, 10), (3, 10), (10, 10), (150, 200)]:
        low, high = wilson(successes, total)
        share = successes / total
        assert 0 <= low <= share <= high <= 1
        for bound in (low, high):
            if 0 < bound < 1:
                z = (share - bound) / math.sqrt(bound * (1 - bound) / total)
                assert abs(z) == pytest.approx(1.96, abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_wilson_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    bounds = {k: wilson(k, 40) for k in range(41)}
    covered = [bounds[int(k)][0] <= 0.3 <= bounds[int(k)][1] for k in rng.binomial(40, 0.3, 2000)]
    assert 0.92 < np.mean(covered) < 0.98


def prompt(index: int, reference: str | None, *texts: str) -> dict:
    answers = [{"text": text, "tokens": len(text), "finished": True} for text in texts]
    return {"prompt": f"p{index}", "index": index, "reference": reference, "completions": answers}


def test_references_are_measured_prompt_by_prompt(monkeypatch):
    """The values are those of rouge-score and NLTK in test_text_metrics.py."""
    monkeypatch.setattr(text_metrics, "corpus_bleu", lambda texts, references: 10.0 * len(texts))
    prompts = [
        prompt(0, "the cat sat on the mat", "the cat is on the mat", "the cat sat on the mat"),
        prompt(1, "a b c d", "a b c d e f", "a b c d e f"),
        prompt(2, None, "nobody knows", "nobody"),
    ]
    found = summary.statistics(prompts)["references"]
    rouge, bleu = [(0.8333333333333334 + 1) / 2, 0.8], [(0 + 1) / 2, 0.5081327481546147]
    for name, values in (("rouge_l", rouge), ("sentence_bleu", bleu)):
        assert found[name]["mean"] == pytest.approx(stdlib.fmean(values))
        assert found[name]["standard_error"] == pytest.approx(stdlib.stdev(values) / math.sqrt(2))
    assert (found["corpus_bleu"], found["prompts"]) == (40.0, 2), "four completions have a reference"


def test_without_sacrebleu_the_other_metrics_are_reported(monkeypatch):
    def missing(texts, references):
        raise ConfigError("BLEU needs sacrebleu")

    monkeypatch.setattr(text_metrics, "corpus_bleu", missing)
    result = {"model": "m", "prompts": [prompt(0, "a b c d", "a b c d")]}
    with pytest.warns(UserWarning, match="BLEU needs sacrebleu"):
        result["statistics"] = summary.statistics(result["prompts"])
    assert result["statistics"]["references"]["corpus_bleu"] is None
    assert "BLEU          1.0000 +- 0.0000\n" in summary.table(result)


def test_two_models_are_compared_prompt_by_prompt():
    def result(means):
        return {"statistics": {"mean": 0.0}, "prompts": [{"index": i, "mean": m} for i, m in enumerate(means)]}

    first, second = result([1.0, 2.0, 5.0, 0.0, 4.0]), result([0.0, 2.5, 1.0, 0.0, 1.0])
    found = summary.paired(first, second)
    differences = [1.0, -0.5, 4.0, 0.0, 3.0]
    assert (found["wins"], found["losses"], found["ties"]) == (3, 1, 1)
    assert found["win_rate"] == 0.75
    assert tuple(found["win_rate_interval_95"]) == wilson(3, 4)
    assert found["difference"]["mean"] == pytest.approx(stdlib.fmean(differences))
    assert found["difference"]["standard_error"] == pytest.approx(stdlib.stdev(differences) / math.sqrt(5))


def test_without_scores_models_are_compared_by_their_references(monkeypatch):
    monkeypatch.setattr(text_metrics, "corpus_bleu", lambda texts, references: 0.0)
    first, second = ([prompt(0, "a b", text), prompt(1, None, "x")] for text in ("a b", "c d"))
    results = [
        {"model": name, "statistics": summary.statistics(prompts), "prompts": prompts}
        for name, prompts in (("one", first), ("two", second))
    ]
    found = summary.paired(*results)
    assert (found["by"], found["prompts"], found["wins"]) == ("ROUGE-L", 1, 1)
    assert found["difference"]["mean"] == 1
    shown = summary.comparison(*results)
    assert "A: one" in shown and "B: two" in shown
    assert "A - B         1.0000 +- 0.0000" in shown
