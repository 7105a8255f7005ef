"""`jaxrlhf plan`: memory and work of a run, from shapes alone."""

import dataclasses
import gc
import json

import jax
import pytest
from support.runs import length_reward

from jaxrlhf import cli, config, memory, plan, runtime
from jaxrlhf.config import file as config_file
from jaxrlhf.errors import ConfigError
from jaxrlhf.plan import costs, programs, report, targets, topology
from jaxrlhf.rollout import engine
from jaxrlhf.training.dpo.trainer import DPOTrainer
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.reward.trainer import RewardTrainer
from jaxrlhf.training.sft import SFTTrainer


def there(*trees) -> int:
    """Bytes of arrays that exist, each counted once."""
    arrays = {id(x): x for tree in trees for x in jax.tree.leaves(tree)}
    return sum(shard.data.nbytes for x in arrays.values() for shard in x.addressable_shards[:1])


@pytest.fixture
def rewarded(ppo, tmp_path):
    """A PPO run whose reward is a function that a config can name."""
    (tmp_path / "reward.py").write_text("def reward(prompts, completions, **_):\n    return [1.0] * len(prompts)\n")
    return ppo | {"reward": config.RewardSource(function=f"{tmp_path / 'reward.py'}:reward")}


@pytest.mark.parametrize(
    "options",
    [
        {"mesh": config.Mesh(fsdp=4, tensor=2)},
        {"lora": config.LoRA(enabled=True, rank=2, quantize="int8")},
        {"critic": config.Critic(trunk="frozen"), "reference": config.Reference(sync_every=2)},
    ],
    ids=["eight-devices", "adapters", "moving"],
)
def test_planned_state_has_the_shapes_and_bytes_of_a_real_ppo_run(ppo, options):
    settings = config.PPOConfig(**ppo | options)
    outlined, real = programs.abstract_trainer(settings, length_reward), PPOTrainer(settings, length_reward)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), outlined.state.template) == jax.tree.map(
        lambda x: (x.shape, x.dtype, x.sharding), real.state.value
    )
    assert plan.size(outlined.state.template) == there(real.state.value)
    assert plan.size(outlined.frozen) == there(real.frozen), "what roles share counts once"


def test_what_a_run_on_eight_devices_holds_is_what_its_plan_says(ppo, tmp_path):
    """While rewards are computed, a device holds the standing arrays and the rollout, and nothing else of size."""
    held = []

    def reward(prompts, completions, **_):
        gc.collect()
        held.append(sum(shard.data.nbytes for x in jax.live_arrays() for shard in x.addressable_shards[:1]))
        return [0.0] * len(prompts)

    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "abcdefgh"}] * 8))
    data = dataclasses.replace(ppo["data"], path=str(tmp_path / "prompts.json"))
    settings = config.PPOConfig(**ppo | {"data": data, "mesh": config.Mesh(fsdp=4, tensor=2)})
    made = plan.plan_of(programs.abstract_trainer(settings, reward))
    gc.collect()
    before = sum(shard.data.nbytes for x in jax.live_arrays() for shard in x.addressable_shards[:1])
    trainer = PPOTrainer(settings, reward)
    trainer.generate_and_score(trainer.prompts(0), 0)
    parts = next(phase.bytes for phase in made.phases if phase.name == "annotation")
    standing = sum(parts[part] for part in ("trained parameters", "optimizer state", "frozen models", "kept rollouts"))
    assert standing <= held[0] - before <= 1.15 * standing
    assert standing > 50_000, "more than counters and keys"


def test_devices_that_roll_out_hold_the_decoding_copy_and_no_state(ppo, monkeypatch):
    options = ppo | {
        "ppo": config.replace(ppo["ppo"], sampler_correction="truncate"),
        "mesh": config.Mesh(fsdp=4),
        "rollout": config.Generation(devices=2),
    }
    settings = config.PPOConfig(**options)
    made = plan.plan_of(programs.abstract_trainer(settings, length_reward), programs.Traced())
    phases = {phase.name: phase for phase in made.phases}
    assert {name: phase.devices for name, phase in phases.items()} == {
        "copy for decoding": 4, "rollout": 2, "annotation": 4, "update": 4,
    }  # fmt: skip
    parts = {part for part, size in phases["rollout"].bytes.items() if size}
    assert parts <= {"decoding copy", "keys and values", "activations, rest"}
    assert made.devices == 6 and made.step_seconds(lambda phase: 1.0) == 3, "the rollout runs beside the others"
    drawn, draw = [], Sampler.draw

    def watched(self, copy, *args, **options):
        drawn.append(there(copy))
        return draw(self, copy, *args, **options)

    monkeypatch.setattr(Sampler, "draw", watched)
    real = PPOTrainer(settings, length_reward)
    real.ahead.start(real.params, real.prompts(0), real.key(0, 0), 0, 0)
    real.ahead.take()
    assert drawn == [phases["rollout"].bytes["decoding copy"]]
    validated = config.replace(settings, **{"data.validation_fraction": 0.25})
    made = plan.plan_of(programs.abstract_trainer(validated, length_reward), programs.Traced())
    phases = {phase.name: phase for phase in made.phases}
    assert phases["other rollouts"].devices == 4 and phases["other rollouts"].bytes["optimizer state"]


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_plan_counts_keys_values_and_states_of_a_device(ppo, recurrent_model, tensor):
    """Of a layer each: two heads of keys and values of every column, and the states of four heads, all split over
    `tensor`; inputs of the convolution, positions and validity, which are not."""
    model = config.replace(ppo["model"], path=str(recurrent_model))
    settings = config.PPOConfig(**ppo | {"model": model, "mesh": config.Mesh(fsdp=2, tensor=tensor)})
    trainer = programs.abstract_trainer(settings, length_reward)
    phases = {phase.name: phase for phase in plan.plan_of(trainer, programs.Traced()).phases}
    rows, columns = 8 // 2, trainer.sampler.columns + 8
    pair, state, window = 2 * 2 * 8 * 4 * columns, 4 * 6 * 5 * 4, 3 * (2 * 2 * 6 + 4 * 5) * 4
    each = (pair + state) // tensor + window + 5 * columns
    assert phases["rollout"].bytes["keys and values"] == rows * each


def test_a_plan_compiles_the_programs_that_the_run_calls(ppo, tmp_path):
    prompts = [{"prompt": "ab"}, {"prompt": "abcdefgh"}, {"prompt": "abc"}] * 4
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    options = ppo | {"data": dataclasses.replace(ppo["data"], path=str(tmp_path / "prompts.json"))}
    trainer = programs.abstract_trainer(config.PPOConfig(**options), length_reward)
    widest = trainer.sampler.columns + trainer.config.sampling.response_length
    found = programs.compile_longest(trainer)
    assert {"convert", "generate", "annotate", "update"} <= found.keys()
    assert found["generate"][0].outputs.tokens.shape == (trainer.config.ppo.batch_size, widest)


@pytest.mark.parametrize("kind", [programs.Programs, programs.Traced])
def test_a_rollout_of_several_programs_is_planned_like_that_of_one(ppo, kind, monkeypatch):
    trainer, rollouts = programs.abstract_trainer(config.PPOConfig(**ppo), length_reward), []
    for chunk in (8, 2):
        monkeypatch.setattr(engine, "CHUNK", chunk)
        made = plan.plan_of(trainer, kind())
        rollouts.append(next(phase for phase in made.phases if phase.name == "rollout"))
    one, several = rollouts
    assert [p.name for p in one.programs] == ["generate"]
    assert [p.name for p in several.programs] == ["admit", "advance", "advance"]  # for half of the response, and all
    assert several.bytes["keys and values"] == one.bytes["keys and values"]
    assert several.total == pytest.approx(one.total, rel=0.1)
    flops = [sum(p.flops * p.times for p in phase.products) for phase in rollouts]
    model, rows, length = trainer.model, trainer.config.ppo.batch_size, trainer.config.sampling.response_length
    column = 2 * 2 * model.num_layers * rows * model.num_heads * model.head_dim  # its products with queries and weights
    assert flops[0] - flops[1] == pytest.approx(column * length / 2 * (length - 1) / 2, rel=1e-6)


def test_supervised_steps_keep_products_with_avx2_alone(supervised, monkeypatch):
    """In micro-batches of few tokens, if model.remat is auto. The programs of the plan do too."""

    def on(*extensions: str) -> None:
        monkeypatch.setattr(runtime, "processor", lambda: runtime.Processor("a processor", 2, extensions, ""))

    def chosen(**options) -> str:
        trainer = programs.abstract_trainer(config.SFTConfig(**supervised | options))
        assert trainer.spec.model.remat == trainer.model.remat
        return trainer.model.remat

    trainer = programs.abstract_trainer(config.SFTConfig(**supervised))
    tokens = trainer.config.train.batch_size * trainer.width
    on("AVX2")
    monkeypatch.setattr(runtime, "KEPT_TOKENS", tokens / trainer.model.hidden_size)
    assert chosen() == "dots"
    assert chosen(model=dataclasses.replace(supervised["model"], remat="full")) == "full"
    assert chosen(lora=config.LoRA(enabled=True, rank=2)) == "full"
    monkeypatch.setattr(runtime, "KEPT_TOKENS", (tokens - 1) / trainer.model.hidden_size)
    assert chosen() == "full"
    assert chosen(train=dataclasses.replace(supervised["train"], micro_batch_size=1)) == "dots"

    def saves() -> list[dict]:
        return [knob.keys for knob in report.knobs(config.SFTConfig(**supervised), 1, "cpu")]

    assert {"model.remat": "full"} in saves()
    on("AVX2", "AVX-512")
    assert chosen(train=dataclasses.replace(supervised["train"], micro_batch_size=1)) == "full"
    assert {"model.remat": "full"} not in saves()


def test_flops_follow_from_the_shapes(supervised):
    """Twice the weights for each token forward, twice that backward; attention and the rest are far smaller."""
    options = supervised | {"model": dataclasses.replace(supervised["model"], remat="none")}
    trainer = programs.abstract_trainer(config.SFTConfig(**options))
    found = programs.compile_longest(trainer)
    (update,) = found["update"]
    flops = sum(p.flops * p.times for p in costs.products(update.jaxpr, 1))
    model, rows, width = trainer.model, trainer.config.train.batch_size, trainer.width
    kernels = sum(x.size for x in jax.tree.leaves(trainer.state.template.params) if x.ndim > 2)
    attention = 2 * 2 * model.num_layers * rows * width**2 * model.num_heads * model.head_dim
    # the head's logits are made again in the backward pass
    head = 2 * rows * (width - 1) * model.vocab_size * model.hidden_size
    assert flops == pytest.approx(3 * (2 * rows * width * kernels + attention) + 4 * head, rel=0.01)


def test_a_plan_reports_whether_it_fits_and_which_options_help(rewarded, capsys, monkeypatch):
    told = config.PPOConfig(**rewarded)
    assert report.examine(told, every_knob=False)
    said = capsys.readouterr().out
    assert "it fits" in said and "keys and values" in said and "gradients" in said and "GFLOP/s" in said
    made = plan.plan(told)
    monkeypatch.setattr(memory, "free_on_device", lambda: 0)
    monkeypatch.setattr(report, "process_bytes", lambda: 0)
    small = (
        report.Knob({"ppo.micro_batch_size": 1}, "slower"),
        report.Knob({"lora.enabled": True, "lora.rank": 1}, "other"),
    )
    monkeypatch.setattr(report, "knobs", lambda *_: [*small, report.Knob({"mesh.fsdp": 3}, "devices")])
    assert not report.examine(told, every_knob=False)
    said = capsys.readouterr().out
    assert "does NOT fit" in said and "--ppo.micro_batch_size 1" in said and "not enough alone" in said
    assert "--mesh.fsdp 3: not possible here" in said
    assert plan.plan(config.replace(told, **small[1].keys)).peak.total < made.peak.total


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_every_suggested_option_changes_the_config(rewarded, supervised, platform):
    for told in (config.PPOConfig(**rewarded), config.SFTConfig(**supervised), config.RewardConfig(**supervised)):
        offered = report.knobs(told, 8, platform)
        assert len(offered) > 3
        for knob in offered:
            assert config.replace(told, **knob.keys) != told


@pytest.mark.parametrize(
    ("kind", "trainer"),
    [(config.SFTConfig, SFTTrainer), (config.RewardConfig, RewardTrainer), (config.DPOConfig, DPOTrainer)],
)
def test_plans_of_supervised_runs_match_their_state(supervised, kind, trainer):
    told = kind(**supervised | {"train": dataclasses.replace(supervised["train"], packing=True, batch_size=2)})
    made, real = plan.plan(told), trainer(told)
    assert made.state == there(real.state.value)
    assert made.peak.total > made.state and made.peak.name == "update"


@pytest.mark.parametrize("slots, target", [(0, "v5e:2x4"), (4, "h100:16")])
def test_without_its_compiler_a_target_is_planned_from_shapes(rewarded, tmp_path, slots, target, monkeypatch, capsys):
    """For any mesh of the target, with the state that the rules give a device, and said to be an estimate."""
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "abcdefgh"}] * 8))
    data = dataclasses.replace(rewarded["data"], path=str(tmp_path / "prompts.json"))
    mesh = config.Mesh(fsdp=4, tensor=2)
    told = config.PPOConfig(**rewarded | {"data": data, "mesh": mesh, "rollout": config.Generation(slots=slots)})
    monkeypatch.setattr(topology, "check_compiler", lambda one: (_ for _ in ()).throw(topology.MissingCompiler("none")))
    parsed = targets.parse(target)
    assert report.examine_target(told, parsed, every_knob=False)
    said = capsys.readouterr().out
    assert "estimated from shapes, because none" in said and "not compiled" in said
    assert f"({target})" in said and "it fits" in said and "published" in said and "all-gather" not in said
    assert ("the mesh uses 8 of the 16 devices" in said) == (target == "h100:16")
    made = plan.estimate(told, parsed)
    assert made.state == there(PPOTrainer(told).state.value), "on eight CPU devices"
    update = next(phase for phase in made.phases if phase.name == "update")
    assert update.bytes["activations, rest"] > 0 and update.products
    assert update.islands == (0,) * 8


def test_plan_recognises_the_method_of_a_config_file(rewarded, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("# jaxrlhf reward\nmodel:\n  path: m\n")
    assert config_file.method_of(file) == "reward"
    file.write_text("model:\n  path: m\nppo:\n  batch_size: 4\n")
    assert config_file.method_of(file) == "ppo"
    file.write_text("model:\n  path: m\n")
    with pytest.raises(ConfigError, match=r"fit sft and reward and dpo and ppo and grpo and distill; give --method"):
        config_file.method_of(file)
    assert cli.main(["plan", str(file)]) == ConfigError.exit_code
    assert "--method" in capsys.readouterr().err
