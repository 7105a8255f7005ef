"""Selection: what is kept of a prompt, files that are read back by the trainers, and jobs that are interrupted."""

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
from jaxrlhf.evaluation import completions as evaluate
from jaxrlhf.rewards.sources.answers import Request
from jaxrlhf.selection import select as selection
from jaxrlhf.selection.log import Log
from jaxrlhf.selection.rule import Rule, Summary, kl_bound

ROW = PromptRow(tokens=[5], text="why?", columns={"prompt": "why?", "answer": 42, "text": "other"}, index=0)


def answers(*scores: float | None, texts: str = "abcdef") -> list[dict]:
    return [{"text": text, "score": score, "finished": True} for text, score in zip(texts, scores, strict=False)]


def test_what_is_kept_of_a_prompt():
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
        (Rule("best", 1.0, 0.3, 0.8), answers(1.0, 1.0), "above what was asked for"),
        (Rule("best", 1.0, 0.3, 0.8), answers(0.0, 0.0, 0.0, 1.0), "below what was asked for"),
        (Rule("best", 1.0, 0.5, 0.5), answers(0.0, 1.0), ""),
    ],
)
def test_why_nothing_is_kept(rule, found, why):
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
def test_rules_that_cannot_be_are_refused(given):
    with pytest.raises(ConfigError):
        Rule(*given)


@pytest.mark.parametrize("n", [2, 16])
def test_the_bound_is_what_distinct_answers_come_to(n):
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
    """Stands in for the model: completion j of prompt i reads " i j." and scores j, but of prompt 3 all score 0 and of
    prompt 4 the first has no score. Keeps the prompts that were asked."""
    asked = []

    def judge(config, scorer, tokenizer, rows, rollout):
        for row in rows:
            asked.append(row.index)
            group = []
            for j in range(3):
                silent = float(row.index == 4 and j == 0)
                part = {"score": 0.0 if row.index == 3 else float(j), "components": {"reward_unanswered": silent}}
                group.append({"text": f" {row.index} {j}.", "tokens": 4, "finished": j > 0, **part})
            yield [group]

    monkeypatch.setattr(evaluate, "open_model", lambda config, tokenizer: (None, None))
    monkeypatch.setattr(evaluate, "prompt_columns", lambda *given: 0)
    monkeypatch.setattr(evaluate, "respond", lambda *given: None)
    monkeypatch.setattr(evaluate, "judge", judge)
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


def select(config: PPOConfig, out: Path, *rule, **more) -> Summary:
    return selection.select(config, out, Rule(*rule), 3, function=lambda completions: [0] * len(completions), **more)


@pytest.mark.parametrize("chat", ["none", "chatml"])
def test_what_is_written_is_what_the_trainers_read(config, drawn, tmp_path, chat):
    """The tokens of a prompt and of a completion are those that were drawn, with whatever else the file holds."""
    names = {"prompt": "question"} if chat == "chatml" else {}
    system = {"system": "ab"} if chat == "chatml" else {}
    rows = [system | {names.get(name, name): value for name, value in row.items()} for row in PROMPTS]
    source = TokenizerSource(chat_template=chat)
    data = Data(path=str(write(tmp_path / "asked.jsonl", rows)))
    config = dataclasses.replace(config, data=data, tokenizer=source)
    tokenizer = load_tokenizer(config.model.path, source)
    prompts = prompt_rows(data, tokenizer).train

    summary = select(config, tmp_path / "best.jsonl", "best")
    assert f"left out      {'question, ' if names else ''}text of the prompt file" in str(summary)
    said = read(tmp_path / "best.jsonl")[0]["completion"]
    assert said == (" 0 2." if chat == "none" else [{"role": "assistant", "content": " 0 2."}])
    found = sft_rows(Data(path=str(tmp_path / "best.jsonl")), tokenizer, completion_only=True)
    ends = tokenizer.eos_id if chat == "none" else tokenizer.encode_batch([tokenizer.turn_end])[0][0]
    for i, (row, prompt) in enumerate(zip(found.train, prompts, strict=True)):
        learnt = [token for token, flag in zip(row.tokens, row.loss_mask, strict=True) if flag]
        assert row.tokens[: len(prompt.tokens)] == prompt.tokens
        assert learnt == [*tokenizer.encode(f" {i} {0 if i == 3 else 2}."), ends]

    select(config, tmp_path / "pairs.jsonl", "pairs")
    pairs = pair_rows(Data(path=str(tmp_path / "pairs.jsonl")), tokenizer).train
    assert len(pairs) == 4, "prompt 3 has no better and worse"
    for i, pair, prompt in zip((0, 1, 2, 4), pairs, [*prompts[:3], prompts[4]], strict=True):
        for row, j in ((pair.chosen, 2), (pair.rejected, 1 if i == 4 else 0)):
            assert row.tokens == [*prompt.tokens, *tokenizer.encode(f" {i} {j}."), ends]

    select(config, tmp_path / "prompts.jsonl2.jsonl", "prompts", 2.0, 0.1)
    again = prompt_rows(dataclasses.replace(data, path=str(tmp_path / "prompts.jsonl2.jsonl")), tokenizer).train
    assert [row.tokens for row in again] == [prompts[i].tokens for i in (0, 1, 2, 4)]
    assert [row.columns["pass_rate"] for row in again] == [1 / 3, 1 / 3, 1 / 3, 1 / 2]
    assert [row.columns["answer"] for row in again] == [0, 1, 2, 4]


def test_the_summary_accounts_for_every_prompt(config, drawn, tmp_path):
    summary = select(config, tmp_path / "o.jsonl", "pairs", 2.0)
    said = str(summary)
    assert "5 prompts, 15 completions" in said
    assert "kept          4 rows (pairs)" in said
    assert "dropped       1 prompts: best and worst have the same score" in said
    assert "unscored      1 completions" in said
    assert f"score {(3 * 3 + 0 + 3) / 14:.4f}; of the rows kept: chosen_score 2.0000, rejected_score 0.2500" in said
    assert "KL" not in said, "a pair is no sample"
    said = str(select(config, tmp_path / "best.jsonl", "best"))
    assert "unfinished    1 rows" in said, "the first completion of prompt 3"
    assert "the best of 3 is at most 0.432 nats" in said


def test_an_interrupted_job_goes_on_where_it_was(config, drawn, tmp_path, monkeypatch, capsys):
    out, judge = tmp_path / "o.jsonl", evaluate.judge
    folder = shutil.copytree(config.model.path, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(b"trained")
    config = dataclasses.replace(config, model=ModelSource(path=str(folder)))
    partial = tmp_path / "o.jsonl.scored"
    select(config, tmp_path / "whole.jsonl", "all")
    drawn.clear()

    def stops(config, scorer, tokenizer, rows, rollout):
        for groups in judge(config, scorer, tokenizer, rows, rollout):
            if drawn[-1] == 3:
                raise KeyboardInterrupt
            yield groups

    monkeypatch.setattr(evaluate, "judge", stops)
    with pytest.raises(KeyboardInterrupt):
        select(config, out, "all")
    assert "3 prompts are scored in" in capsys.readouterr().err
    assert not out.exists()
    with partial.open("ab") as file:
        file.write(b'[{"text": "half a li')
    monkeypatch.setattr(evaluate, "judge", judge)
    for other in (
        dataclasses.replace(config, seed=1),
        dataclasses.replace(config, data=Data(path=str(write(tmp_path / "other.jsonl", PROMPTS[::-1])))),
    ):
        with pytest.raises(StorageError, match="made with another (seed|prompts); go back to that"):
            select(other, out, "all")
    weights.write_bytes(b"trained further")
    with pytest.raises(StorageError, match="made with another model; go back to that"):
        select(config, out, "all")
    weights.write_bytes(b"trained")
    drawn.clear()
    slow = dataclasses.replace(config.reward.components[0], timeout=9.0)
    config = dataclasses.replace(config, reward=RewardSource(components=(slow,)), ppo=PPO(batch_size=64))
    select(config, out, "all")
    assert drawn == [3, 4]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()

    with pytest.raises(StorageError, match="exists; give another --out, or --fresh"):
        select(config, out, "best")
    select(config, out, "best", fresh=True)
    assert len(read(out)) == 5


def test_a_function_that_has_been_mended_is_said_and_the_job_goes_on(config, tmp_path):
    file = tmp_path / "mine.py"
    config = dataclasses.replace(config, reward=RewardSource(function=f"{file}:reward"))
    file.write_text("1 / 0")
    with Log(tmp_path / "l", {"n": 1}, selection._code(config), fresh=False) as log:
        log.append([[]])
    file.write_text("")
    with pytest.warns(UserWarning, match=r"mine\.py has changed since .*l was begun: scores that are there stay"):
        again = Log(tmp_path / "l", {"n": 1}, selection._code(config), fresh=False)
    with again:
        assert again.count == 1


def test_a_job_that_fails_before_anything_is_scored_leaves_nothing(config, drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "respond", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        select(config, tmp_path / "new" / "o.jsonl", "all")
    assert not list((tmp_path / "new").iterdir())


def test_what_people_answer_is_kept_beside_the_file(config, drawn, tmp_path, monkeypatch):
    """Also of a batch in the middle of which they leave."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    said = iter(["3", "1"])

    def asked(question):
        for line in said:
            return line
        raise EOFError

    monkeypatch.setattr("builtins.input", asked)

    def judge(config, scorer, tokenizer, rows, rollout):
        scorer.parts["human"][1](Request(["why?"] * 3, ["a", "b", "c"], {}))
        yield []

    monkeypatch.setattr(evaluate, "judge", judge)
    people = RewardSource(components=({"human": "score"},))  # type: ignore[arg-type]
    with pytest.raises(RewardError, match="the person left"):
        selection.select(dataclasses.replace(config, reward=people), tmp_path / "new" / "o.jsonl", Rule("best"), 3)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["human.jsonl"]
    assert [row["answer"] for row in read(tmp_path / "new" / "human.jsonl")] == [3, 1]


def test_two_jobs_do_not_write_to_one_file(config, tmp_path):
    with Log(tmp_path / "l", {}, {}, fresh=False), pytest.raises(StorageError, match="another process writes to"):
        Log(tmp_path / "l", {}, {}, fresh=False)


def test_what_would_fail_at_the_end_is_refused_at_the_door(config, drawn, tmp_path):
    bad = dataclasses.replace(config, data=Data(path=str(tmp_path / "p.parquet")))
    pq.write_table(pa.table({"prompt": ["why?"], "when": [datetime.date(2026, 1, 1)]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match="row 1 of the prompts: column 'when' cannot be written as JSON"):
        select(bad, tmp_path / "o.jsonl", "all")
    with pytest.raises(ConfigError, match="ends in .jsonl"):
        select(config, tmp_path / "o.json", "all")
    with pytest.raises(ConfigError, match="a file of its own"):
        select(config, Path(config.data.path), "all", fresh=True)
    with pytest.raises(ConfigError, match="all would be the same"):
        select(dataclasses.replace(config, sampling=Sampling(greedy=True)), tmp_path / "o.jsonl", "all")
    with pytest.raises(ConfigError, match="--keep pairs needs two"):
        selection.select(config, tmp_path / "o.jsonl", Rule("pairs"), 1)
    assert not drawn


def test_the_command(config, drawn, tmp_path, capsys):
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
    assert shown.endswith(f"wrote {tmp_path}/out.jsonl\n")
    assert [row["answer"] for row in read(tmp_path / "out.jsonl")] == [0, 1, 2]
    assert main(asked) == 7, "not over a file that is there"
    assert main(["generate", "m", "--prompt", "x", "--best-by", "r.yaml"]) == 3
    assert "--best-by is for --prompts FILE" in capsys.readouterr().err


def test_a_score_of_float32_reaches_a_threshold_of_the_same_spelling(config, drawn, tmp_path, monkeypatch):
    def judge(config, scorer, tokenizer, rows, rollout):
        scored = {"score": float(np.float32(0.9)), "components": {"reward": float(np.float32(0.9))}}
        yield [[{"text": "a", "tokens": 1, "finished": True, **scored}] for _ in rows]

    monkeypatch.setattr(evaluate, "judge", judge)
    assert select(config, tmp_path / "o.jsonl", "above", 0.9).rows == 5
    assert {row["score"] for row in read(tmp_path / "o.jsonl")} == {0.9}
