"""The demo from end to end: strictness is learned, facts are kept, and all output files are written."""

import json

import pytest

from jaxrlhf.data.datasets import pair_rows, prompt_rows, sft_rows
from jaxrlhf.data.tokenizer import load_tokenizer
from jaxrlhf.demo import pipeline, task
from jaxrlhf.errors import StorageError


def test_every_row_of_the_data_files_is_used_and_fits_the_model(tmp_path):
    sft, reward, ppo = pipeline.configs(tmp_path, seed=0)
    pipeline.write_data(tmp_path, seed=0)
    tokenizer = load_tokenizer(tmp_path / "base", sft.tokenizer)
    limit = json.loads((tmp_path / "base" / "config.json").read_text())["max_position_embeddings"]
    splits = [
        sft_rows(sft.data, tokenizer, sft.completion_only),
        pair_rows(reward.data, tokenizer),
        prompt_rows(ppo.data, tokenizer),
    ]
    for split in splits:
        assert not split.report.dropped and not split.report.cut
    longest = max(max(split.report.lengths) for split in splits)
    assert longest <= limit
    answers = [sum(row.loss_mask) for row in splits[0].train]
    assert max(answers) <= ppo.sampling.response_length
    assert max(splits[2].report.lengths) + ppo.sampling.response_length <= limit
    assert {row.columns["category"] for row in splits[2].train} == set(task.CATEGORIES)


def test_a_directory_with_other_things_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match=r"not a demo's.*--output"):
        pipeline.run(tmp_path, seed=0, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_strictness_is_learnt_and_facts_are_kept(tmp_path, capsys):
    results = pipeline.run(tmp_path / "demo", seed=0)
    before, after = (results["right_level"][name] for name in ("before", "after"))
    assert 0.3 < before["share"] < 0.65
    assert after["share"] > 0.9 and after["interval_95"][0] > before["interval_95"][1]
    facts = results["fact_right"]  # not worse than chance explains: inside the interval of what they were before
    assert facts["after"]["share"] >= facts["before"]["interval_95"][0] and facts["after"]["share"] > 0.97
    assert results["well_formed"]["after"]["share"] > 0.9

    assert json.loads((tmp_path / "demo" / "results.json").read_text()) == results
    answers = [json.loads(line) for line in (tmp_path / "demo" / "answers.jsonl").read_text().splitlines()]
    assert {row["prompt"] for row in answers} == {
        row["prompt"] for row in task.make_prompts(pipeline.HELD_OUT, 9, held_out=True)
    }
    for name in ("before", "after"):  # the figures are those of the answers, judged again
        verdicts = [task.judge(row["prompt"], row[name]["text"]) for row in answers]
        for measure in pipeline.MEASURES:
            share = sum(getattr(verdict, measure) for verdict in verdicts) / len(verdicts)
            assert share == pytest.approx(results[measure][name]["share"])

    printed = capsys.readouterr().out
    for text in ("[1/4] SFT", "[2/4] reward model", "[3/4] PPO", "[4/4] evaluation", "next:", *task.CATEGORIES):
        assert text in printed
    assert "\r" not in printed and "\x1b" not in printed
