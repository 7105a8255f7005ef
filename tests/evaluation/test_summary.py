"""Statistics and model comparison, against independent formulas."""

import math
import statistics as stdlib

import numpy as np
import pytest

from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluation import console, summary, text_metrics
from jaxrlhf.evaluation.text_layout import text_table
from jaxrlhf.evaluation.win_rates import against
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
    result = {"prompt": f"p{index}", "index": index, "file": "f", "reference": reference, "completions": answers}
    return summary.with_reference(result)


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
    result = {"model": "m", "weights": {}, "groups": {}, "prompts": [prompt(0, "a b c d", "a b c d")]}
    with pytest.warns(UserWarning, match="BLEU needs sacrebleu"):
        result["statistics"] = summary.statistics(result["prompts"])
    assert result["statistics"]["references"]["corpus_bleu"] is None
    shown = console.table(result)
    assert "BLEU          1.0000 +- ?\n" in shown, "an error cannot be estimated from one prompt"
    assert "REFERENCE" in shown and "BLEU 1.000, ROUGE-L 1.000" in shown


def test_two_models_are_compared_prompt_by_prompt():
    def prompts(means):
        answer = {"text": "four", "tokens": 1}
        return [{"index": i, "file": "f", "mean": m, "completions": [answer]} for i, m in enumerate(means)]

    found = against(prompts([0.0, 2.5, 1.0, 0.0, 1.0]), prompts([1.0, 2.0, 5.0, 0.0, 4.0]), "score")
    differences = [1.0, -0.5, 4.0, 0.0, 3.0]
    assert (found["wins"], found["losses"], found["ties"]) == (3, 1, 1)
    assert found["win_rate"] == 3.5 / 5 and found["decided_win_rate"] == 0.75
    assert tuple(found["decided_win_rate_interval_95"]) == wilson(3, 4)
    assert found["difference"]["mean"] == pytest.approx(stdlib.fmean(differences))
    assert found["difference"]["standard_error"] == pytest.approx(stdlib.stdev(differences) / math.sqrt(5))
    assert found["length_controlled"]["win_rate"] == pytest.approx(0.7), "all answers are equally long"
    low, high = found["difference"]["interval_95"]
    assert low < 1.5 < high
    with pytest.raises(AssertionError, match="different prompts"):
        against(prompts([1.0]), [prompts([0.0, 1.0])[1]], "score")


def test_without_scores_models_are_compared_by_their_references():
    first, second = ([prompt(0, "a b", text), prompt(1, None, "x")] for text in ("c d", "a b"))
    found = against(first, second, "ROUGE-L")
    assert (found["by"], found["prompts"], found["left_out"], found["wins"]) == ("ROUGE-L", 1, 1, 1)
    assert found["difference"] == {"mean": 1, "standard_error": None, "interval_95": None}
    assert found["win_rate_interval_95"] is found["length_controlled"]["interval_95"] is None


def test_nothing_to_compare_is_said():
    found = against([prompt(0, None, "x")], [prompt(0, None, "y")], "ROUGE-L")
    assert (found["prompts"], found["win_rate"], found["difference"]) == (0, None, None)


def test_groups_are_the_statistics_of_their_prompts():
    """Means, errors, intervals and pass@k of each category, each from its own prompts alone."""

    def scored(index, category, *scores):
        answers = [
            {"text": "x" * index, "tokens": index + k, "finished": k == 0, "score": s, "components": {"r": s}}
            for k, s in enumerate(scores)
        ]
        known = [s for s in scores if s is not None]
        mean = {"mean": stdlib.fmean(known) if known else None, "spread": 0.0}
        return {"index": index, "category": category, "reference": None, "completions": answers, **mean}

    prompts = [
        scored(1, "b", 1.0, 3.0),
        scored(2, "a", 5.0, 5.0),
        scored(3, "b", 0.0, 0.5),
        scored(4, "(none)", None, None),
    ]
    found = summary.by_group(prompts, "category", 1.0)
    assert list(found) == ["a", "b", "(none)"]
    b = found["b"]
    assert (b["prompts"], b["completions"], b["unscored"]) == (2, 4, 0)
    assert b["mean"] == pytest.approx((2 + 0.25) / 2) and b["standard_error"] == pytest.approx(1.75 / 2)
    assert b["components"]["r"] == {"mean": b["mean"], "standard_error": b["standard_error"]}
    assert b["finished"] == 0.5 and tuple(b["finished_interval_95"]) == wilson(2, 4)
    assert b["passes"]["pass_at"]["1"] == {"mean": 0.5, "standard_error": 0.5, "prompts": 2}
    assert b["tokens_mean"] == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert found["a"]["standard_error"] is None, "one prompt"
    assert "mean" not in found["(none)"] and found["(none)"]["unscored"] == 1
    assert found["(none)"]["passes"]["pass_at"] == {}
    shown = "\n".join(text_table(console.group_rows(found, "category")))
    assert "5.000 +- ?" in shown and "0.50 [0.15, 0.85]" in shown


def test_pass_rates_leave_out_prompts_with_fewer_scored_completions():
    def scored(*scores):
        answers = [{"text": "", "tokens": 1, "finished": True, "score": s, "components": {}} for s in scores]
        return {"index": 0, "reference": None, "completions": answers, "mean": 0.0, "spread": 0.0}

    prompts = [scored(1.0, 0.0, 0.0, 2.0), scored(1.0, None, None, 0.0)]
    rates = summary.measures(prompts, 1.0)["passes"]["pass_at"]
    assert list(rates) == ["1", "2", "4"]
    assert (rates["1"]["mean"], rates["1"]["prompts"]) == (0.5, 2)
    assert (rates["2"]["mean"], rates["2"]["prompts"]) == (pytest.approx((5 / 6 + 1) / 2), 2)
    assert (rates["4"]["mean"], rates["4"]["prompts"]) == (1.0, 1)
