"""Selection: rules, output files that trainers read back, and resumed jobs."""

import dataclasses
import datetime
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxrlhf.cli import main
from jaxrlhf.config import PPO, Data, Logging, ModelSource, PPOConfig, RewardSource, Sampling, TokenizerSource
from jaxrlhf.data.datasets import PromptRow, pair_rows, prompt_rows, sft_rows
from jaxrlhf.data.tokenizer import load_tokenizer
from jaxrlhf.errors import ConfigError, DataError, RewardError, StorageError
from jaxrlhf.evaluation import generation
from jaxrlhf.rewards.sources.protocol import ScoreRequest
from jaxrlhf.selection.log import open_log
from jaxrlhf.selection.rule import Rule, Summary, kl_bound
from jaxrlhf.selection.select import code_hashes, select

ROW = PromptRow(tokens=[5], text="why?", columns={"prompt": "why?", "answer": 42, "text": "other"}, index=0)


def answers(*scores: float | None, texts: str = "abcdef") -> list[dict]:
    return [{"text": text, "score": score, "finished": True} for text, score in zip(texts, scores, strict=False)]


def test_rows_kept_by_each_rule():
    found = answers(1.0, 3.0, None, 0.0, 3.0)
    common = {"prompt": "why?", "answer": 42}  # `text` would make it another format

    def row(text, score, **more):
        return {**common, **more, "completion": text, "score": score, "finished": True}

    assert Rule("best").apply(ROW, found) == ([row("b", 3.0)], ""), "the first of the best"
    assert [r["completion"] for r in Rule("all").apply(ROW, found)[0]] == ["a", "b", "d", "e"], "not the unscored"
    above = [row(text, score, pass_rate=0.75) for text, score in (("a", 1.0), ("b", 3.0), ("e", 3.0))]
    assert Rule("above", 1.0).apply(ROW, found) == (above, "")
    pair = {"chosen": "b", "chosen_score": 3.0, "rejected": "d", "rejected_score": 0.0}
    assert Rule("pairs").apply(ROW, found) == ([common | pair], "")
    assert Rule("prompts", 1.0).apply(ROW, found) == ([ROW.columns | {"mean_score": 1.75, "pass_rate": 0.75}], "")


@pytest.mark.parametrize(
    ("rule", "found", "why"),
    [
        (Rule("pairs"), answers(1.0, 1.0), "the same score"),
        (Rule("pairs"), answers(1.0, None), "the same score"),
        (Rule("pairs"), answers(1.0, 2.0, texts="aa"), "the same text"),
        (Rule("best"), answers(None, None), "no completion has a score"),
        (Rule("above", 5.0), answers(1.0, 2.0), "no completion scores 5 or more"),
        (Rule("best", 1.0, 0.3, 0.8), answers(1.0, 1.0), "above --max-pass-rate"),
        (Rule("best", 1.0, 0.3, 0.8), answers(0.0, 0.0, 0.0, 1.0), "below --min-pass-rate"),
        (Rule("best", 1.0, 0.5, 0.5), answers(0.0, 1.0), ""),
    ],
)
def test_reasons_for_dropping_a_prompt(rule, found, why):
    kept, said = rule.apply(ROW, found)
    assert bool(kept) == (not said)
    assert why in said and bool(why) == bool(said)


@pytest.mark.parametrize(
    "given",
    [
        ("above",),
        ("best", None, 0.1),
        ("best", None, None, 0.9),
        ("best", 1.0, 0.9, 0.1),
        ("best", 1.0, 0, 1.1),
        ("best", math.nan),
        ("bets",),
    ],
)
def test_contradictory_rules_are_refused(given):
    with pytest.raises(ConfigError):
        Rule(*given)


@pytest.mark.parametrize("n", [2, 16])
def test_the_kl_bound_is_the_limit_for_distinct_completions(n):
    """The best of n of K equally likely answers is the k-th with probability (k/K)^n - ((k-1)/K)^n."""

    def divergence(count):
        shares = [(k / count) ** n - ((k - 1) / count) ** n for k in range(1, count + 1)]
        return math.fsum(p * math.log(p * count) for p in shares if p)

    assert divergence(3) < divergence(100) < kl_bound(n)
    assert divergence(50_000) == pytest.approx(kl_bound(n), abs=1e-3)
    assert kl_bound(1) == 0


PROMPTS = [{"prompt": f"question {'x' * i}", "answer": i, "text": "other"} for i in range(5)]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def drawn(monkeypatch) -> list[int]:
    """Replace the model: completion j of prompt i is " i j." with score j, except that all of prompt 3 score 0 and the
    first of prompt 4 is unscored. Returns the list of prompts completed so far."""
    asked = []

    def judge(config, scorer, tokenizer, rows, rollout):
        for row in rows:
            asked.append(row.index)
            group = []
            for j in range(3):
                score = None if row.index == 4 and j == 0 else 0.0 if row.index == 3 else float(j)
                group.append({"text": f" {row.index} {j}.", "tokens": 4, "finished": j > 0, "score": score})
            yield [group]

    monkeypatch.setattr(generation, "open_model", lambda *given: (None, None))
    monkeypatch.setattr(generation, "prompt_columns", lambda *given: 0)
    monkeypatch.setattr(generation, "generate", lambda *given: None)
    monkeypatch.setattr(generation, "score_completions", judge)
    return asked


@pytest.fixture
def config(tiny_model, tmp_path) -> PPOConfig:
    return PPOConfig(
        model=ModelSource(path=str(tiny_model)),
        data=Data(path=str(write(tmp_path / "prompts.jsonl", PROMPTS))),
        reward=RewardSource(components=({"function": "passed", "name": "reward"},)),  # type: ignore[arg-type]
        ppo=PPO(batch_size=1, num_mini_batches=1),
        sampling=Sampling(response_length=8),
        logging=Logging(quiet=True),
    )


def run(config: PPOConfig, out: Path, *rule, **more) -> Summary:
    return select(config, out, Rule(*rule), 3, function=lambda completions: [0] * len(completions), **more)


@pytest.mark.parametrize("chat", ["none", "chatml"])
def test_trainers_read_the_written_files_back(config, drawn, tmp_path, chat):
    """Prompts and completions have the tokens that were generated, whatever other columns the file has."""
    names = {"prompt": "question"} if chat == "chatml" else {}
    system = {"system": "ab"} if chat == "chatml" else {}
    rows = [system | {names.get(name, name): value for name, value in row.items()} for row in PROMPTS]
    source = TokenizerSource(chat_template=chat)
    data = Data(path=str(write(tmp_path / "asked.jsonl", rows)))
    config = dataclasses.replace(config, data=data, tokenizer=source)
    tokenizer = load_tokenizer(config.model.path, source)
    prompts = prompt_rows(data, tokenizer).train

    summary = run(config, tmp_path / "best.jsonl", "best")
    assert f"left out      {'question, system, ' if names else ''}text of the prompt file" in str(summary)
    said = read(tmp_path / "best.jsonl")[0]["completion"]
    assert said == (" 0 2." if chat == "none" else [{"role": "assistant", "content": " 0 2."}])
    found = sft_rows(Data(path=str(tmp_path / "best.jsonl")), tokenizer, completion_only=True)
    ends = tokenizer.eos_id if chat == "none" else tokenizer.encode_batch([tokenizer.turn_end])[0][0]
    for i, (row, prompt) in enumerate(zip(found.train, prompts, strict=True)):
        learnt = [token for token, flag in zip(row.tokens, row.loss_mask, strict=True) if flag]
        assert row.tokens[: len(prompt.tokens)] == prompt.tokens
        assert learnt == [*tokenizer.encode(f" {i} {0 if i == 3 else 2}."), ends]

    run(config, tmp_path / "pairs.jsonl", "pairs")
    pairs = pair_rows(Data(path=str(tmp_path / "pairs.jsonl")), tokenizer).train
    assert len(pairs) == 4, "prompt 3 has no better and worse"
    for i, pair, prompt in zip((0, 1, 2, 4), pairs, [*prompts[:3], prompts[4]], strict=True):
        for row, j in ((pair.chosen, 2), (pair.rejected, 1 if i == 4 else 0)):
            assert row.tokens == [*prompt.tokens, *tokenizer.encode(f" {i} {j}."), ends]

    run(config, tmp_path / "prompts.jsonl2.jsonl", "prompts", 2.0, 0.1)
    again = prompt_rows(dataclasses.replace(data, path=str(tmp_path / "prompts.jsonl2.jsonl")), tokenizer).train
    assert [row.tokens for row in again] == [prompts[i].tokens for i in (0, 1, 2, 4)]
    assert [row.columns["pass_rate"] for row in again] == [1 / 3, 1 / 3, 1 / 3, 1 / 2]
    assert [row.columns["answer"] for row in again] == [0, 1, 2, 4]


def test_the_summary_counts_every_prompt(config, drawn, tmp_path):
    summary = run(config, tmp_path / "o.jsonl", "pairs", 2.0)
    said = str(summary)
    assert "5 prompts, 15 completions" in said
    assert "kept          4 rows (pairs)" in said
    assert "dropped       1 prompts: best and worst have the same score" in said
    assert "unscored      1 completions" in said
    assert f"score {(3 * 3 + 0 + 3) / 14:.4f}; of the rows kept: chosen_score 2.0000, rejected_score 0.2500" in said
    assert "KL" not in said, "a pair is no sample"
    said = str(run(config, tmp_path / "best.jsonl", "best"))
    assert "unfinished    1 rows" in said, "the first completion of prompt 3"
    assert "the best of 3 is at most 0.432 nats" in said


def test_an_interrupted_job_resumes(config, drawn, tmp_path, monkeypatch, capsys):
    out, judge = tmp_path / "o.jsonl", generation.score_completions
    folder = shutil.copytree(config.model.path, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(b"trained")
    config = dataclasses.replace(config, model=ModelSource(path=str(folder)))
    partial = tmp_path / "o.jsonl.scored"
    run(config, tmp_path / "whole.jsonl", "all")
    drawn.clear()

    def stops(config, scorer, tokenizer, rows, rollout):
        for groups in judge(config, scorer, tokenizer, rows, rollout):
            if drawn[-1] == 3:
                raise KeyboardInterrupt
            yield groups

    monkeypatch.setattr(generation, "score_completions", stops)
    with pytest.raises(KeyboardInterrupt):
        run(config, out, "all")
    assert "3 prompts are scored in" in capsys.readouterr().err
    assert not out.exists()
    tomorrow = type("date", (datetime.date,), {"today": classmethod(lambda cls: cls(2031, 1, 2))})
    monkeypatch.setattr(datetime, "date", tomorrow)  # a chat template keeps the date of the first call
    with partial.open("ab") as file:
        file.write(b'[{"text": "half a li')
    monkeypatch.setattr(generation, "score_completions", judge)
    for other in (
        dataclasses.replace(config, seed=1),
        dataclasses.replace(config, data=Data(path=str(write(tmp_path / "other.jsonl", PROMPTS[::-1])))),
    ):
        with pytest.raises(StorageError, match="made with another (seed|prompts); restore the old value"):
            run(other, out, "all")
    weights.write_bytes(b"trained further")
    with pytest.raises(StorageError, match="made with another model; restore the old value"):
        run(config, out, "all")
    weights.write_bytes(b"trained")
    drawn.clear()
    slow = dataclasses.replace(config.reward.components[0], timeout=9.0)
    config = dataclasses.replace(config, reward=RewardSource(components=(slow,)), ppo=PPO(batch_size=64))
    run(config, out, "all")
    assert drawn == [3, 4]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()

    with pytest.raises(StorageError, match="exists; give another --out, or --fresh"):
        run(config, out, "best")
    run(config, out, "best", fresh=True)
    assert len(read(out)) == 5


def test_changed_reward_code_is_a_warning_and_the_job_resumes(config, tmp_path):
    file = tmp_path / "mine.py"
    config = dataclasses.replace(config, reward=RewardSource(function=f"{file}:reward"))
    file.write_text("1 / 0")
    with open_log(tmp_path / "l", {"n": 1}, code_hashes(config), fresh=False) as log:
        log.append([[]])
    file.write_text("")
    with (
        pytest.warns(UserWarning, match=r"mine\.py has changed since .*l was started: its scores are kept"),
        open_log(tmp_path / "l", {"n": 1}, code_hashes(config), fresh=False) as again,
    ):
        assert again.count == 1


def test_a_job_that_fails_before_anything_is_scored_leaves_nothing(config, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "generate", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(config, tmp_path / "new" / "o.jsonl", "all")
    assert not list((tmp_path / "new").iterdir())


def test_human_scores_are_kept_next_to_the_output(config, drawn, tmp_path, monkeypatch):
    """Including scores of a batch that the person left unfinished."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    said = iter(["3", "1"])

    def asked(question):
        for line in said:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", asked)

    def judge(config, scorer, tokenizer, rows, rollout):
        scorer.components["human"].source(ScoreRequest(["why?"] * 3, ["a", "b", "c"], {}))
        yield []

    monkeypatch.setattr(generation, "score_completions", judge)
    people = RewardSource(components=({"human": "score"},))  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="the person left"):
        select(dataclasses.replace(config, reward=people), tmp_path / "new" / "o.jsonl", Rule("best"), 3)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["human.jsonl"]
    assert [row["answer"] for row in read(tmp_path / "new" / "human.jsonl")] == [3, 1]


def test_two_jobs_do_not_write_to_one_file(config, tmp_path):
    with (
        open_log(tmp_path / "l", {}, {}, fresh=False),
        pytest.raises(StorageError, match="another process writes to"),
        open_log(tmp_path / "l", {}, {}, fresh=False),
    ):
        pass


def test_invalid_requests_are_refused_before_generation(config, drawn, tmp_path):
    bad = dataclasses.replace(config, data=Data(path=str(tmp_path / "p.parquet")))
    pq.write_table(pa.table({"prompt": ["why?"], "when": [datetime.date(2026, 1, 1)]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="row 1 of the prompts: column 'when' cannot be written as JSON"):
        run(bad, tmp_path / "o.jsonl", "all")
    with pytest.raises(ConfigError, match="ends in .jsonl"):
        run(config, tmp_path / "o.json", "all")
    with pytest.raises(ConfigError, match="a file of its own"):
        run(config, Path(config.data.path), "all", fresh=True)
    with pytest.raises(ConfigError, match="all would be the same"):
        run(dataclasses.replace(config, sampling=Sampling(greedy=True)), tmp_path / "o.jsonl", "all")
    with pytest.raises(ConfigError, match="--keep pairs needs two"):
        select(config, tmp_path / "o.jsonl", Rule("pairs"), 1)
    assert not drawn


def test_generate_with_prompts_writes_selected_rows(config, drawn, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def reward(completions):\n    return [0.0] * len(completions)\n")
    (tmp_path / "reward.yaml").write_text(f"reward: {{function: {tmp_path}/mine.py:reward}}\n")
    asked = ["generate", config.model.path, "--prompts", config.data.path, "--sampling.response_length", "8"]
    assert main([*asked, "--best-by", f"{tmp_path}/reward.yaml"]) == 3
    assert "--prompts needs --out" in capsys.readouterr().err
    asked += ["--n", "3", "--out", f"{tmp_path}/out.jsonl"]
    assert main(asked) == 3
    assert "give --best-by FILE" in capsys.readouterr().err
    assert main([*asked, "--best-by", f"{tmp_path}/nowhere.yaml"]) == 3
    assert "cannot read the config file" in capsys.readouterr().err
    asked += ["--best-by", f"{tmp_path}/reward.yaml"]
    assert main([*asked, "--min-pass-rate", "0.2"]) == 3
    assert main([*asked, "--keep", "pairs", "--threshold", "2", "--max-pass-rate", "0.4"]) == 0
    shown = capsys.readouterr().out
    assert "generate step 5/5 score=0.8571" in shown
    assert f"wrote {tmp_path}/out.jsonl\n" in shown
    assert shown.endswith(f"--data.path {tmp_path}/out.jsonl  # train on them\n")
    assert [row["answer"] for row in read(tmp_path / "out.jsonl")] == [0, 1, 2]
    assert main(asked) == 7, "not over a file that is there"
    assert main(["generate", "m", "--prompt", "x", "--best-by", "r.yaml"]) == 3
    assert "--best-by needs --prompts FILE" in capsys.readouterr().err


def test_a_float32_score_reaches_the_same_decimal_threshold(config, drawn, tmp_path, monkeypatch):
    def judge(config, scorer, tokenizer, rows, rollout):
        scored = {"score": float(np.float32(0.9)), "components": {"reward": float(np.float32(0.9))}}
        yield [[{"text": "a", "tokens": 1, "finished": True, **scored}] for _ in rows]

    monkeypatch.setattr(generation, "score_completions", judge)
    assert run(config, tmp_path / "o.jsonl", "above", 0.9).rows == 5
    assert {row["score"] for row in read(tmp_path / "o.jsonl")} == {0.9}


def test_a_selection_without_scores_has_no_mean():
    found = Summary("m", Rule("best"), 2)
    found.add([{"text": "a", "score": None, "finished": True}] * 2, [], "no completion has a score")
    assert "mean          score none; of the rows kept: none" in str(found)
    assert "unscored      2 completions" in str(found)
