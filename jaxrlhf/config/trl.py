"""Names of TRL and transformers' TrainingArguments that differ from ours."""

from collections.abc import Collection

_BATCH = ("train.batch_size", "ppo.batch_size", "grpo.batch_size")
_MICRO = ("train.micro_batch_size", "ppo.micro_batch_size", "grpo.micro_batch_size")
_EPOCHS = ("ppo.num_ppo_epochs", "grpo.num_iterations")
_METRIC = ("train.metric", "validation.metric")
_BEST = ("train.keep_best", "validation.keep_best")
_EVALUATIONS = ("train.eval_every", "validation.eval_steps")
_DTYPES = ("model.compute_dtype", "model.param_dtype")
_ACCUMULATION = "the rows of an optimizer step, over all devices, are computed in micro-batches"

NAMES: dict[str, tuple[tuple[str, ...], str]] = {
    "adam_beta1": (("optim.beta1",), ""),
    "adam_beta2": (("optim.beta2",), ""),
    "adam_epsilon": (("optim.eps",), ""),
    "adap_kl_ctrl": (("ppo.kl_target",), "null is a constant kl_coef"),
    "assistant_only_loss": (("completion_only",), ""),
    "attn_implementation": (("model.attention",), ""),
    "aux_loss_coef": (("model.router_aux_loss_coef",), ""),
    "beta": (("dpo.beta", "grpo.kl_coef", "distill.beta"), ""),
    "bf16": (_DTYPES, "bfloat16 or float32"),
    "completion_only_loss": (("completion_only",), ""),
    "dataset_config": (("data.subset",), ""),
    "dataset_name": (("data.path",), ""),
    "dataset_test_split": (("data.validation_split",), ""),
    "dataset_train_split": (("data.split",), ""),
    "disable_dropout": (("lora.dropout",), "the model itself has no dropout"),
    "epsilon": (("grpo.cliprange",), ""),
    "epsilon_high": (("grpo.cliprange_high",), ""),
    "eval_steps": (_EVALUATIONS, ""),
    "eval_strategy": (_EVALUATIONS, ""),
    "fp16": (_DTYPES, "bfloat16 or float32"),
    "gradient_accumulation_steps": ((*_BATCH, *_MICRO), _ACCUMULATION),
    "gradient_checkpointing": (("model.remat",), "full, dots or none"),
    "greater_is_better": (("train.mode", "validation.mode"), "max or min"),
    "horizon": (("ppo.kl_horizon",), ""),
    "init_kl_coef": (("ppo.kl_coef",), ""),
    "lmbda": (("distill.lmbda",), ""),
    "load_best_model_at_end": (_BEST, ""),
    "load_in_4bit": (("lora.quantize",), "nf4"),
    "load_in_8bit": (("lora.quantize",), "int8"),
    "logging_steps": (("logging.log_every",), ""),
    "lora_alpha": (("lora.alpha",), ""),
    "lora_dropout": (("lora.dropout",), ""),
    "lora_r": (("lora.rank",), ""),
    "lora_target_modules": (("lora.target_modules",), ""),
    "loss_type": (("dpo.loss", "grpo.method"), ""),
    "lr_scheduler_type": (("optim.schedule",), ""),
    "max_completion_length": (("sampling.response_length",), ""),
    "max_new_tokens": (("sampling.response_length",), ""),
    "max_seq_length": (("data.max_length",), ""),
    "metric_for_best_model": (_METRIC, ""),
    "mini_batch_size": (("ppo.num_mini_batches", "grpo.num_mini_batches"), "their number, not their size"),
    "model_name_or_path": (("model.path",), ""),
    "model_revision": (("model.revision",), ""),
    "multi_objective_aggregation": (("grpo.method",), "gdpo normalises each component, then sums"),
    "num_sample_generations": (("logging.sample_every",), "steps between samples"),
    "output_dir": (("run_dir",), ""),
    "output_router_logits": (("model.router_aux_loss_coef",), "a weight above 0"),
    "overwrite_output_dir": (("run_dir",), "`--fresh` starts over in an existing one"),
    "per_device_eval_batch_size": (("train.eval_batch_size",), ""),
    "per_device_train_batch_size": ((*_BATCH, *_MICRO), _ACCUMULATION),
    "ppo_epochs": (_EPOCHS, ""),
    "precompute_ref_log_probs": (("dpo.reference_folder",), "they are always computed once"),
    "ref_model_mixup_alpha": (("reference.sync_alpha",), ""),
    "ref_model_sync_steps": (("reference.sync_every",), ""),
    "report_to": (("logging.tensorboard", "logging.wandb_project", "logging.trackio_project"), ""),
    "resume_from_checkpoint": (("run_dir",), "a run in an existing one is resumed"),
    "reward_model_path": (("reward.model",), ""),
    "rpo_alpha": (("dpo.sft_coef",), ""),
    "save_steps": (("checkpoint.save_every",), ""),
    "save_total_limit": (("checkpoint.keep",), ""),
    "sft_model_path": (("model.path",), ""),
    "steps_per_generation": (("grpo.num_mini_batches",), ""),
    "sync_ref_model": (("reference.sync_every",), ""),
    "target": (("ppo.kl_target",), ""),
    "teacher_model_name_or_path": (("teacher.path",), ""),
    "teacher_model_revision": (("teacher.revision",), ""),
    "torch_dtype": (_DTYPES, ""),
    "use_adaptive_entropy": (("grpo.entropy_target",), "set it, or leave it at null"),
    "use_bnb_nested_quant": (("lora.double_quant",), ""),
    "use_peft": (("lora.enabled",), "or `--use-lora`"),
    "vllm_importance_sampling_clip_max": (("ppo.sampler_cap", "grpo.sampler_cap"), ""),
    "vllm_importance_sampling_clip_min": (("ppo.sampler_floor", "grpo.sampler_floor"), ""),
    "vllm_importance_sampling_correction": (("ppo.sampler_correction", "grpo.sampler_correction"), ""),
    "vllm_importance_sampling_mode": (
        ("ppo.sampler_correction", "grpo.sampler_correction"),
        "truncate, token_mask, sequence_truncate or sequence_mask",
    ),
    "warmup_ratio": (("optim.warmup_steps",), "a number of steps"),
}
"""Name there -> our options, in all methods, and a remark."""


def answer(key: str, known: Collection[str]) -> str:
    """`; TRL's ... is ... here` if the last part of an unknown `key` is a name of TRL's, else an empty string.

    `known` are the keys of the config, or of the section, that it was given to.
    """
    name = key.rpartition(".")[2]
    options, remark = NAMES.get(name, ((), ""))
    ours = [option for option in options if option in known]
    ours = ours or [leaf for leaf in (option.rpartition(".")[2] for option in options) if leaf in known]
    if not ours:
        return ""
    return f"; TRL's {name} is {' and '.join(ours)} here{f' ({remark})' if remark else ''}"
