"""Runs with adapters: only those train, one model lies under all roles, and what goes out is what was trained."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import equal, length_reward, records, supervised_step

import jaxrlhf
from jaxrlhf import config, weights
from jaxrlhf import lora as lora_params
from jaxrlhf.errors import ConfigError, Preempted
from jaxrlhf.rewards.sources.model import RewardModel
from jaxrlhf.training.export import export, merge
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.reward.trainer import RewardTrainer
from jaxrlhf.training.sft import SFTTrainer

LORA = config.LoRA(enabled=True, rank=2, alpha=8.0)


def sizes(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_supervised_runs_learn_in_their_adapters_alone(kind, supervised, on_disk, tmp_path, written):
    trainer = {
        "sft": lambda o: SFTTrainer(config.SFTConfig(**o)),
        "reward": lambda o: RewardTrainer(config.RewardConfig(**o)),
    }[kind](supervised | on_disk | {"run_dir": str(tmp_path / "run"), "lora": config.replace(LORA, dropout=0.1)})
    before = jax.device_get(trainer.frozen)
    (trained,) = trainer.state.template.params.values()
    assert trained.keys() <= {"lora", "score"} and "lora" in trained
    assert sizes(trainer.state.template.opt_state) < 3 * sizes(trained) + 9, "no moments for what does not train"
    trainer.train()
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert losses[-1] < losses[0]
    equal(trainer.frozen, before)
    files = {path.name for path in (tmp_path / "run" / "export").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files and "config.json" not in files
    model, params = jaxrlhf.load(tmp_path / "run")
    assert model.head == ("lm" if kind == "sft" else "linear")
    whole = merge(tmp_path / "run", tmp_path / "whole")
    equal(jaxrlhf.load(whole)[1], params)
    equal(jaxrlhf.load(trainer.save_pretrained(tmp_path / "again", merge_lora=True))[1], params)


def test_the_experts_of_a_mixture_learn_in_adapters_over_a_packed_model(supervised, written, tmp_path):
    shutil.copytree(written, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "config" / "config.json"
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    names = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | names | mixture))
    model, params = jaxrlhf.load(file.parent, init="random", key=jax.random.key(7))
    tokenizer = jaxrlhf.load_tokenizer(file.parent, config.TokenizerSource())
    base = weights.export(tmp_path / "base", model, params, source=file.parent, tokenizer=tokenizer)
    options = supervised | {"model": config.ModelSource(path=str(base), router_aux_loss_coef=0.01)}
    options |= {"lora": config.replace(LORA, quantize="nf4")}
    after = []
    for rows in (6, 2):
        options |= {"train": config.replace(supervised["train"], micro_batch_size=rows)}
        options |= {"optim": config.Optim(learning_rate=1e-2, eps=1e-3)}
        trainer = SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / str(rows)), **options))
        supervised_step(trainer, 0)
        after.append(jax.device_get(trainer.state.value.params["policy"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *after)
    trainer = SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / "run"), **options))
    before = jax.device_get((trainer.frozen, trainer.state.value.params["policy"]["lora"]["layers"]["experts"]))
    trainer.train()
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert losses[-1] < losses[0]
    equal(trainer.frozen, before[0])
    assert "codes" in trainer.frozen["layers"]["experts"]["down"]
    moved = trainer.state.value.params["policy"]["lora"]["layers"]["experts"]
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(before[1]), strict=True))
    assert "mlp.experts.down_proj" in (tmp_path / "run" / "export" / "adapter_config.json").read_text()
    tree = jaxrlhf.load(tmp_path / "run")[1]["layers"]["experts"]
    whole = jaxrlhf.load(trainer.save_pretrained(tmp_path / "whole", merge_lora=True))[1]["layers"]["experts"]
    packed = lora_params.unpack(trainer.frozen)["layers"]["experts"]
    merged, alone = (
        each["down"]["kernel"] - under["down"]["kernel"]
        for each, under in ((whole, packed), (tree, params["layers"]["experts"]))
    )
    np.testing.assert_allclose(merged, alone, atol=1e-5)


def test_dropout_does_not_depend_on_the_micro_batch(supervised, on_disk, tmp_path):
    after = []
    for rows in (6, 2):
        options = supervised | on_disk | {"lora": config.replace(LORA, dropout=0.3)}
        options |= {"train": config.replace(supervised["train"], micro_batch_size=rows)}
        options |= {"optim": config.Optim(learning_rate=1e-2, eps=1e-3)}
        trainer = SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / str(rows)), **options))
        supervised_step(trainer, 0)
        after.append(jax.device_get(trainer.state.value.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *after)


@pytest.mark.parametrize(
    ("trunk", "moving"), [("own", True), pytest.param("shared", False, marks=pytest.mark.long), ("frozen", True)]
)
def test_ppo_keeps_one_model_under_all_roles(ppo, on_disk, tmp_path, trunk, moving):
    options = ppo | on_disk | {"critic": config.Critic(trunk=trunk), "ppo": config.replace(ppo["ppo"], kl_coef=0.3)}
    options |= {"reference": config.Reference(sync_every=2 * moving)}
    trainer = PPOTrainer(config.PPOConfig(run_dir=str(tmp_path / "run"), **options), reward=length_reward)
    base = trainer.frozen["policy"]
    for other in (trainer.frozen["reference"], trainer.frozen["critic"]):
        assert all(other[part] is base[part] for part in other), "the same arrays, no copy"
    assert trainer.state.template.params["policy"].keys() == {"lora"}
    assert trainer.state.template.params["critic"].keys() == ({"lora", "score"} if trunk == "own" else {"score"})
    before, head = jax.device_get((base, trainer.state.value.params["critic"]))
    trainer.train()
    log = records(tmp_path / "run")
    assert log[0]["objective/kl"] == 0 and log[0]["val/first_log_ratio_max"] < 1e-5
    assert log[1]["objective/kl"] != 0 and all(record["skipped_updates"] == 0 for record in log)
    equal(trainer.frozen["policy"], before)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), jax.device_get(trainer.state.value.params["critic"]), head)
    assert all(jax.tree.leaves(moved)), "the critic's adapters and its head train"
    for role in ("policy", "critic"):
        now = jaxrlhf.load(trainer.save_pretrained(tmp_path / role, role))
        equal(jaxrlhf.load(export(tmp_path / "run", tmp_path / f"{role}-again", role))[1], now[1])
        equal(jaxrlhf.load(trainer.save_pretrained(tmp_path / f"{role}-whole", role, merge_lora=True))[1], now[1])


def test_a_full_update_and_one_of_adapters_start_from_the_same_policy(ppo, on_disk):
    """What adapters change is what can move: the first rollout and its log-probs are those of full training."""
    made = []
    for lora in (config.LoRA(), LORA):
        options = ppo | on_disk | {"lora": lora}
        trainer = PPOTrainer(config.PPOConfig(**options), reward=length_reward)
        made.append(trainer.ppo_step([row.text for row in trainer.data.train[:8]]))
    full, low = made
    assert full["generated_texts"] == low["generated_texts"]
    for key in ("objective/entropy", "val/first_log_ratio_max", "objective/kl"):
        assert low[key] == pytest.approx(full[key], abs=1e-4), key


def test_a_stopped_run_with_adapters_goes_on_bit_for_bit(ppo, on_disk, tmp_path, request):
    options = ppo | on_disk | {"reference": config.Reference(sync_every=2, sync_alpha=0.5)}
    options |= {"lora": config.replace(LORA, use_dora=True, layers=(1, 2), target_modules=("q_proj", "down_proj"))}

    def make(name):
        return PPOTrainer(config.PPOConfig(run_dir=str(tmp_path / name), **options), reward=length_reward)

    whole = make("whole")
    whole.train()
    request.getfixturevalue("stop_at_two")
    with pytest.raises(Preempted):
        make("parts").train()
    resumed = make("parts")
    resumed.train()
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    equal(resumed.state.value, whole.state.value)
    adapters = json.loads((tmp_path / "parts" / "export" / "adapter_config.json").read_text())
    assert adapters["use_dora"] and adapters["layers_to_transform"] == [1]


def test_ppo_starts_from_a_folder_of_adapters_and_writes_what_it_merged(supervised, ppo, on_disk, tmp_path):
    """A base and SFT adapters: merged, the reference too, and the merged model written where asked."""
    SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / "sft"), **supervised | on_disk)).train()
    merged = jaxrlhf.load(tmp_path / "sft")[1]
    source = config.ModelSource(path=str(tmp_path / "sft"), merged_path=str(tmp_path / "merged"))
    trainer = PPOTrainer(config.PPOConfig(**ppo | on_disk | {"model": source}), reward=length_reward)
    equal(trainer.frozen["reference"], merged)
    equal(jaxrlhf.load(tmp_path / "merged")[1], merged)
    trainer.ppo_step([row.text for row in trainer.data.train[:8]])
    out = trainer.save_pretrained(tmp_path / "out")
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(tmp_path / "merged")
    copy = jaxrlhf.load(trainer.save_pretrained(tmp_path / "whole", merge_lora=True))[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), jaxrlhf.load(out)[1], copy)
    lost = config.replace(source, merged_path="")
    trainer = PPOTrainer(config.PPOConfig(**ppo | on_disk | {"model": lost}), reward=length_reward)
    assert (trainer.save_pretrained(tmp_path / "lost") / "model.safetensors").is_file(), "nothing to lay adapters over"


def test_a_reward_model_of_adapters_lies_over_the_policys_model(supervised, ppo, on_disk, tmp_path):
    RewardTrainer(config.RewardConfig(run_dir=str(tmp_path / "rm"), **supervised | on_disk)).train()
    judged = ppo | on_disk | {"reward": config.RewardSource(model=str(tmp_path / "rm"))}
    trainer, apart = PPOTrainer(config.PPOConfig(**judged)), RewardModel(str(tmp_path / "rm"), micro_batch_size=4)
    judge = trainer.scorer.model
    assert judge is not None and "lora" in judge.params and "lora" not in apart.params
    base = trainer.frozen["policy"]
    assert all(judge.params[part] is base[part] for part in base if part != "lm_head"), "the same arrays, no copy"
    rollout, _ = trainer.generate(trainer.data.train[:8], 0)
    np.testing.assert_allclose(judge.score_rollout(rollout)[0], apart.score_rollout(rollout)[0], rtol=1e-4, atol=1e-5)
    started = judged | {"critic": config.Critic(init="reward"), "run_dir": str(tmp_path / "started")}
    from_reward = PPOTrainer(config.PPOConfig(**started))
    theirs = from_reward.frozen["critic"]["layers"]["mlp"]["up"]["kernel"]
    assert np.any(np.asarray(theirs) != np.asarray(base["layers"]["mlp"]["up"]["kernel"])), "its adapters are in it"
    from_reward.train()
    again = jaxrlhf.load(export(tmp_path / "started", tmp_path / "critic", "critic", merge_lora=True))[1]
    now = jaxrlhf.load(from_reward.save_pretrained(tmp_path / "critic-now", "critic", merge_lora=True))[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), again, now)  # another mesh
    full = PPOTrainer(config.PPOConfig(**judged | {"lora": config.LoRA()}))
    assert "lora" not in full.scorer.model.params, "a model that trains is nothing to lie over"


def test_ppo_over_a_packed_model(ppo, on_disk, tmp_path):
    """With DoRA, whose magnitudes are those of the packed model."""
    options = ppo | on_disk | {"lora": config.replace(LORA, quantize="nf4", use_dora=True)}
    options |= {"critic": config.Critic(trunk="own")}
    trainer = PPOTrainer(config.PPOConfig(run_dir=str(tmp_path / "run"), **options), reward=length_reward)
    codes = trainer.frozen["policy"]["layers"]["mlp"]["up"]["codes"]
    assert codes.dtype == jnp.uint8
    assert (
        trainer.frozen["critic"]["layers"]
        is trainer.frozen["policy"]["layers"]
        is trainer.frozen["reference"]["layers"]
    )
    trainer.train()
    log = records(tmp_path / "run")
    assert log[0]["val/first_log_ratio_max"] < 1e-5
    assert abs(log[0]["objective/kl"]) <= 1e-5, "m / |W| is 1 to rounding"
    assert log[0]["val/sampler_logprob_gap_max"] < 1e-4, "what is sampled from is what is trained"
    assert log[-1]["objective/kl"] != 0
    for role in ("policy", "critic"):
        again = jaxrlhf.load(export(tmp_path / "run", tmp_path / f"{role}-again", role, merge_lora=True))[1]
        now = jaxrlhf.load(trainer.save_pretrained(tmp_path / role, role, merge_lora=True))[1]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), again, now)  # another mesh


def test_the_base_may_be_in_fewer_bits_than_its_adapters(ppo, on_disk):
    source = config.replace(on_disk["model"], param_dtype="bfloat16")
    trainer = PPOTrainer(config.PPOConfig(**ppo | on_disk | {"model": source}), reward=length_reward)
    trainer.ppo_step([row.text for row in trainer.data.train[:8]])
    assert {x.dtype for x in jax.tree.leaves(trainer.frozen["policy"])} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(trainer.state.value.params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target_modules": ("q_prj",)}, "a llama has no 'q_prj'; did you mean 'q_proj'\\?; it has q_proj, k_proj"),
        ({"layers": (1, 5)}, r"lora.layers is \[1, 5\], and the model has 2 layers"),
    ],
)
def test_what_the_model_does_not_have_is_refused(ppo, on_disk, changes, said):
    options = ppo | on_disk | {"lora": config.replace(LORA, **changes)}
    with pytest.raises(ConfigError, match=said):
        PPOTrainer(config.PPOConfig(**options), reward=length_reward)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 0}, "rank"),
        ({"target_modules": ()}, "lora.target_modules is empty"),
        ({"layers": (3, 3)}, r"lora.layers is \[3, 3\]: give \[start, end\) with start < end"),
        ({"dropout": 1.0}, "dropout"),
        (
            {"quantize": "nf4", "enabled": False},
            "quantised weights cannot be trained, only adapters on top of them; set lora.enabled",
        ),
        (
            {"quantize": "int8", "double_quant": True},
            "lora.double_quant needs lora.quantize: nf4, but lora.quantize is int8",
        ),
    ],
)
def test_contradictions_in_the_section(changes, said):
    with pytest.raises(ValueError, match=said):
        config.replace(LORA, **changes)


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_dropout_is_off_in_on_policy_training(ppo, on_disk, method):
    """An update with it is the one without, bit for bit, and the run says so."""
    prompts = ["say red ", "say blue ", "say green ", "say pink "]
    made = []
    for dropout in (0.0, 0.5):
        options = ppo | on_disk | {"lora": config.replace(LORA, dropout=dropout)}
        if method == "grpo":
            del options["ppo"]
            options["grpo"] = config.GRPO(batch_size=8, total_episodes=8, num_generations=2, num_iterations=2)
            trainer = GRPOTrainer(config.GRPOConfig(**options), reward=length_reward)
            trainer.grpo_step(prompts)
        else:
            trainer = PPOTrainer(config.PPOConfig(**options), reward=length_reward)
            trainer.ppo_step(prompts)
        said = f"lora.dropout has no effect in {method}" in trainer.describe()
        assert said == (dropout > 0)
        made.append(trainer.state.value.params)
    equal(*made)


def test_a_frozen_trunk_has_no_place_beside_adapters(supervised):
    with pytest.raises(ValueError, match="frozen_trunk is true and lora.enabled too"):
        config.RewardConfig(**supervised | {"lora": LORA, "frozen_trunk": True})
