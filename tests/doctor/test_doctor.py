"""Checks of a computer, a model and data: valid ones pass, broken ones fail."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxrlhf import distributed, doctor, runtime, weights
from jaxrlhf.cli import main


@pytest.fixture(scope="module")
def model_folder(tiny_model, tmp_path_factory) -> Path:
    model, params = weights.load(tiny_model, init="random", key=jax.random.key(1))
    return weights.export(tmp_path_factory.mktemp("models") / "m", model, params, source=tiny_model)


@pytest.mark.parametrize(
    ("extensions", "operand", "keys"),
    [(("AVX2",), "left", "by row"), (("AVX2", "AVX-512"), "right", "by column, from 8 rows on")],
)
def test_it_says_where_weights_and_keys_stand_while_decoding(extensions, operand, keys, monkeypatch):
    monkeypatch.setattr(runtime, "processor", lambda: runtime.Processor("a processor", 2, extensions, ""))
    (line,) = (
        line for line in doctor.computer() if line.startswith(f"weights while decoding in float32: {operand} op")
    )
    assert line.endswith(f"keys of the cache: {keys}")


@pytest.mark.parametrize(
    ("extensions", "remat"),
    [(("AVX2",), "full (dots for supervised steps of up to 2 x hidden_size tokens)"), (("AVX2", "AVX-512"), "full")],
)
def test_it_says_which_processor_keeps_products(extensions, remat, monkeypatch):
    monkeypatch.setattr(runtime, "processor", lambda: runtime.Processor("a processor", 2, extensions, ""))
    assert f"auto: dtype float32, model.remat {remat}, model.attention plain" in doctor.computer()


def test_a_valid_model_passes_every_check(model_folder, capsys):
    assert main(["doctor", str(model_folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("packages: jax ") for line in lines)
    assert any(line.startswith("memory: ") and "GiB free" in line for line in lines)
    assert any(
        line.startswith("setting JAX_COMPILATION_CACHE_DIR=") and line.endswith("environment)") for line in lines
    )
    assert any(line.startswith("auto: dtype float32, model.remat full") for line in lines)
    checks = [line.split(":")[0] for line in lines if line.startswith(("ok", "FAIL", "skip"))]
    assert checks == [
        "ok    tokenizer",
        "ok    decode equals forward",
        "ok    KL of a copy is zero",
        "ok    padding changes nothing",
        "ok    load and export",
        "skip  first rows of the data",
        "ok    tokenizer round trip of the prompts",
        "ok    trained sequences end with a stop token",
        "ok    rollout masks",
        "ok    rollouts depend on the key alone",
        "skip  the reward runs",
        "ok    micro-batches change nothing",
        "ok    KL to the reference is zero",
        "ok    first ratio is one",
        "ok    sampler and training log-probs agree",
    ]


def test_the_job_of_this_process_is_named(monkeypatch):
    for job in distributed.JOBS.values():
        for name in job:
            monkeypatch.delenv(name, raising=False)
    assert "processes: this one alone; docs/hosts.md says how several hosts train together" in doctor.computer()
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert any(line.startswith("processes: this one alone, of 4 in a job of SLURM; ") for line in doctor.computer())


def test_a_folder_without_weights_is_checked_with_random_ones(tiny_model, capsys):
    assert main(["doctor", str(tiny_model)]) == 4
    assert "no model.safetensors" in capsys.readouterr().err
    assert main(["doctor", str(tiny_model), "--model.init", "random"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "skip  load and export: model.init is random: there are no weights to compare" in lines
    assert sum(line.startswith("ok ") for line in lines) == 12


def test_a_wrong_tokenizer_fails_and_the_other_checks_still_run(model_folder, tmp_path, capsys):
    folder = tmp_path / "m"
    shutil.copytree(model_folder, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"new{i}": 100 + i for i in range(3)}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert main(["doctor", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "FAIL  tokenizer: the tokenizer has ids up to" in printed
    assert "ok    load and export" in printed


def test_each_numeric_check_can_fail(model_folder, monkeypatch):
    model, params = weights.load(model_folder)
    tokens, mask = doctor._random_rows(model)
    assert doctor.decode_equals_forward(params, model, tokens, mask)[0]
    assert doctor.padding_is_invisible(params, model, tokens, mask)[0]
    assert doctor.copy_has_no_divergence(params, model, tokens, mask)[0]
    forward = doctor.forward
    monkeypatch.setattr(doctor, "forward", lambda p, m, t, k: forward(p, m, t, jnp.ones(t.shape, bool)))
    assert not doctor.padding_is_invisible(params, model, tokens, mask)[0], "a forward that ignores its mask"
    assert not doctor.decode_equals_forward(params, model, tokens, mask)[0]


def test_a_changed_tensor_is_found(model_folder, monkeypatch):
    load = weights.load

    def nudged(*args, **options):
        model, params = load(*args, **options)
        return model, params | {"norm": jax.tree.map(lambda x: x + 1e-6, params["norm"])}

    monkeypatch.setattr(weights, "load", nudged)
    passed, found = doctor.export_is_identical(model_folder)
    assert passed is False
    assert "1 of " in found
    assert "model.norm.weight" in found


def test_a_model_that_cannot_be_loaded_is_an_error_with_its_own_code(tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "nowhere")]) == 4
    assert "Traceback" not in capsys.readouterr().err


def test_data_is_described_for_every_method(tmp_path, tiny_model, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "why? ", "chosen": "so.", "rejected": "no"}\n' * 2)
    assert main(["data", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "2 rows with columns prompt, chosen, rejected" in printed
    assert "jaxrlhf reward, dpo: pairs from prompt, chosen, rejected" in printed
    assert main(["data", str(file), "--tokenizer.path", str(tiny_model)]) == 0
    printed = capsys.readouterr().out
    assert "why? [[so.</s>]]" in printed
    assert "why? [[no</s>]]" in printed
    file.write_text('{"prompt": "why? ", "completion": "so.", "label": 1}\n')
    assert main(["data", str(file)]) == 0
    assert "classification, dpo --dpo.loss kto: prompt and completion from prompt, completion, label" in (
        capsys.readouterr().out
    )
    assert main(["data", str(file), "--data.score", "quality"]) == 0
    printed = capsys.readouterr().out
    assert "jaxrlhf reward, dpo: no, it has no columns of preference pairs\n" in printed
    assert "jaxrlhf reward --loss regression: no. data.score: no column 'quality'" in printed
    assert "ranking" not in printed
    file.write_text('{"a": "b"}\n')
    assert main(["data", str(file)]) == 0
    assert "jaxrlhf sft: no. " in (printed := capsys.readouterr().out) and "Known: text | messages" in printed
    (tmp_path / "bad.jsonl").write_text('{"a": 1\n')
    assert main(["data", str(tmp_path / "bad.jsonl")]) == 4
    assert "bad.jsonl:1" in capsys.readouterr().err


def test_help_explains_the_exit_code(capsys):
    assert main(["doctor", "--help"]) == 0
    assert "exit code 1 if a check fails" in " ".join(capsys.readouterr().out.split())
