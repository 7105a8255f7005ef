"""Torch peers of bench.py, which starts `bench_peers.py NAME JOB` in their own environment.

hf    transformers: generate, and plain torch for scoring and training
trl   trl.experimental.ppo, DPOTrainer and GRPOTrainer, one iteration or optimizer step per turn
"""

# pyright: reportMissingImports=false

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_process import Job, Turns, characters, peak_resident, timed
from bench_shapes import SHAPES, gemms

Repeat = Callable[[], dict[str, Any]]
turns = Turns()
name, job = sys.argv[1], Job(**json.loads(sys.argv[2]))
if job.dtype == "bfloat16" and job.case == "ppo" and name == "trl":
    # PPOConfig(bf16=True) does nothing here: that trainer creates its own Accelerator, which reads the environment
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


def random_tokens(rows: int, columns: int) -> Any:
    return np.random.default_rng(0).integers(3, SHAPES[job.shape]["vocab_size"], (rows, columns))


def device() -> str:
    return "cuda" if job.device == "gpu" else "cpu"


def wait() -> None:
    """Wait until the GPU has finished."""
    if job.device == "gpu":
        torch.cuda.synchronize()


def torch_model(kind: str, dtype: str) -> Any:
    """A transformers model with random weights: "CausalLM", or "SequenceClassification" with one label."""
    config = transformers.AutoConfig.from_pretrained(job.model)
    if kind == "SequenceClassification":
        config.num_labels = 1
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config, dtype=getattr(torch, dtype))
    if job.checkpointing:
        model.gradient_checkpointing_enable()
    return model.to(device())


def limits() -> Repeat:
    """Time matrix products and memory reads in torch."""
    config = SHAPES[job.shape]

    def rate(amount: float, work: Callable[[], Any]) -> float:
        def run() -> None:
            work()
            wait()

        run()
        return amount / statistics.median(timed(run)[0] for _ in range(9)) / 1e9

    def measure() -> dict[str, float]:
        rates = {}
        for dtype in ("float32", "bfloat16"):
            for m, k, n in gemms(config, job.device, job.quick):
                x, w = (torch.ones(size, dtype=getattr(torch, dtype), device=device()) for size in ((m, k), (n, k)))
                rates[f"{dtype} {m}x{k}x{n}"] = rate(2.0 * m * k * n, lambda x=x, w=w: x @ w.T)
        block = torch.ones((256, 2**20 if job.shape != "T" else 2**14), device=device())
        rates["read"] = rate(block.nbytes, block.sum)
        return rates

    def repeat() -> dict[str, Any]:
        seconds, rates = timed(measure)
        return {"seconds": seconds, "rates": rates}

    return repeat


def generation() -> Repeat:
    """Generate a batch to its full length (generate), or batches of `slots` until every row has ended (engine)."""
    model = torch_model("CausalLM", job.dtype).eval()
    ragged = job.case == "engine"
    stops = list(range(0, model.config.vocab_size, job.response)) if ragged else None
    model.generation_config.eos_token_id = stops  # None: no row ends early
    prompts = torch.tensor(random_tokens(job.batch, job.prompt), device=device())

    def run(rows: Any, length: int) -> int:
        ids = model.generate(
            input_ids=rows,
            attention_mask=torch.ones_like(rows),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
            pad_token_id=1,
        )
        wait()
        made = ids[:, job.prompt :]
        if stops is None:
            return made.numel()
        ended = torch.isin(made, torch.tensor(stops, device=made.device)).int()
        return int((ended.cumsum(1) - ended == 0).sum())  # tokens up to and including the first end token

    def repeat() -> dict[str, Any]:
        if ragged:
            seconds, counts = timed(lambda: [run(rows, 4 * job.response) for rows in prompts.split(job.slots)])
            return {"seconds": seconds, "tokens": sum(counts)}
        prefill, _ = timed(lambda: run(prompts, 1))
        seconds, tokens = timed(lambda: run(prompts, job.response))
        return {"seconds": seconds, "tokens": tokens, "phases": {"prefill": prefill}}

    with torch.no_grad():
        run(prompts[: job.slots], 4)
    return repeat


def scoring() -> Repeat:
    """Compute log-probs and entropy of responses by one forward pass."""
    model = torch_model("CausalLM", job.dtype).eval()
    tokens = torch.tensor(random_tokens(job.batch, job.prompt + job.response), device=device())

    def score() -> None:
        with torch.no_grad():
            logits = model(tokens, logits_to_keep=job.response + 1).logits[:, :-1].float()
            logprobs = torch.log_softmax(logits, dim=-1)
            logprobs.gather(2, tokens[:, -job.response :, None])
            (logprobs.exp() * logprobs).sum(-1)
        wait()

    score()
    return lambda: {"seconds": timed(score)[0], "tokens": tokens.numel()}


def supervised() -> Repeat:
    """Run an optimizer step in plain torch: AdamW on float32 weights, with autocast if the job is in bfloat16."""
    model = torch_model("CausalLM" if job.case == "sft" else "SequenceClassification", "float32").train()
    rows = job.batch if job.case == "sft" else 2 * job.batch
    tokens = torch.tensor(random_tokens(rows, job.prompt + job.response), device=device())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    micro = job.micro_batch or job.batch

    def loss(start: int) -> Any:
        if job.case == "sft":
            part = tokens[start : start + micro]
            return model(part, labels=part).loss
        pairs = torch.cat([tokens[start : start + micro], tokens[job.batch + start : job.batch + start + micro]])
        chosen, rejected = model(pairs).logits.float().split(micro)
        return -torch.nn.functional.logsigmoid(chosen - rejected).mean()

    def step() -> None:
        for start in range(0, job.batch, micro):
            with torch.autocast(device(), dtype=torch.bfloat16, enabled=job.dtype == "bfloat16"):
                value = loss(start) * micro / job.batch
            value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wait()

    step()
    return lambda: {"seconds": timed(step)[0], "tokens": tokens.numel()}


def trl_settings() -> dict[str, Any]:
    """Training arguments of TRL's trainers: those of the job, and nothing written."""
    micro = job.micro_batch or job.batch
    return {
        "output_dir": str(Path(job.work) / "trl"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": job.batch // micro,
        "learning_rate": 1e-6,
        "gradient_checkpointing": job.checkpointing,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": job.device == "cpu",
    }


class Turn(transformers.TrainerCallback):
    """Reports a turn of `steps` optimizer steps, after one to warm up, and waits for the next.

    `report(start, end)` is the record of a turn by the times at which it was asked for and had ended.
    """

    def __init__(self, settings: dict[str, Any], report: Callable[[float, float], dict[str, Any]], steps: int = 1):
        self.report, self.steps = report, steps
        self.settings = {name: value for name, value in settings.items() if name != "output_dir"}
        self.done, self.start = 0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done += 1
        if self.done % self.steps:
            return
        wait()
        record = self.report(self.start, time.perf_counter())
        if self.done > self.steps:
            turns.say(**record)
        else:
            turns.ready("torch", "transformers", "trl", "accelerate", settings=self.settings)
        if not turns.go():
            turns.say(peak_bytes=peak_bytes())
            os._exit(0)
        self.start = time.perf_counter()


def lora(task: str) -> Any:
    import peft

    assert job.lora_rank
    return peft.LoraConfig(r=job.lora_rank, lora_alpha=2 * job.lora_rank, target_modules="all-linear", task_type=task)


def trl_ppo() -> None:
    """Run TRL's PPO. `train` runs all iterations."""
    import datasets
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    rows = [{"input_ids": row.tolist()} for row in random_tokens(job.batch, job.prompt)]
    settings = trl_settings() | {
        "num_mini_batches": 1,
        "num_ppo_epochs": job.epochs,
        "total_episodes": job.batch * (job.rounds + 2),
        "local_rollout_forward_batch_size": job.batch,
        "response_length": job.response,
        "temperature": 1.0,
        "num_sample_generations": 0,
    }
    clock = {"start": 0.0, "rollout": 0.0, "update": 0.0}
    generate = ppo_trainer.batch_generation

    def rollout(*args: Any, **kwargs: Any) -> Any:
        clock["start"] = time.perf_counter()
        result = generate(*args, **kwargs)
        wait()
        clock["rollout"] = time.perf_counter()
        clock["update"] = 0.0
        return result

    def report(_: float, end: float) -> dict[str, Any]:
        phases = {
            "rollout": clock["rollout"] - clock["start"],
            "scoring": clock["update"] - clock["rollout"],
            "update": end - clock["update"],
        }
        return {"seconds": end - clock["start"], "tokens": job.batch * job.response, "phases": phases}

    ppo_trainer.batch_generation = rollout
    value, adapted = torch_model("SequenceClassification", "float32"), {}
    if job.lora_rank:
        import peft

        value, adapted = peft.get_peft_model(value, lora("SEQ_CLS")), {"peft_config": lora("CAUSAL_LM")}
    trainer = PPOTrainer(
        PPOConfig(**settings),
        transformers.AutoTokenizer.from_pretrained(job.model),
        model=torch_model("CausalLM", "float32"),
        ref_model=None if adapted else torch_model("CausalLM", "float32"),  # the policy without its adapters
        reward_model=torch_model("SequenceClassification", "float32"),
        value_model=value,
        train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[Turn(settings, report)],
        **adapted,
    )
    accumulate = trainer.accelerator.accumulate

    def updating(*models: Any) -> Any:
        if not clock["update"]:
            wait()
            clock["update"] = time.perf_counter()
        return accumulate(*models)

    trainer.accelerator.accumulate = updating
    trainer.train()


def trl_model() -> str:
    """A folder with the tokenizer and a random model, from which these trainers also load the reference."""
    folder = Path(job.work) / "trl-model"
    if not folder.exists():
        torch_model("CausalLM", "float32").save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(job.model).save_pretrained(folder)
    return str(folder)


def random_texts(rows: int, columns: int) -> list[str]:
    return [" ".join(f"w{i}" for i in row) for row in random_tokens(rows, columns)]


def clocked(owner: Any, method: str, spent: dict[str, float]) -> None:
    """Make a method add its seconds to `spent`."""
    inner = getattr(owner, method)

    def outer(*args: Any, **kwargs: Any) -> Any:
        def work() -> Any:
            result = inner(*args, **kwargs)
            wait()
            return result

        seconds, result = timed(work)
        spent[method] = spent.get(method, 0.0) + seconds
        return result

    setattr(owner, method, outer)


def trl_dpo() -> None:
    """Run TRL's DPO, with the reference's forward pass in every step, and the response's end cut off by max_length."""
    import datasets
    from trl import DPOConfig, DPOTrainer

    width = job.prompt + job.response
    settings = trl_settings() | {"max_steps": job.rounds + 2, "max_length": width, "bf16": job.dtype == "bfloat16"}
    spent: dict[str, float] = {}

    def report(start: float, end: float) -> dict[str, Any]:
        reference = spent.pop("forward")
        phases = {"reference": reference, "update": end - start - reference}
        return {"seconds": end - start, "tokens": 2 * job.batch * width, "phases": phases}

    texts = random_texts(3 * job.batch, max(job.prompt, job.response))
    sides = {"prompt": (job.prompt, ""), "chosen": (job.response, " "), "rejected": (job.response, " ")}
    pairs = {
        side: [before + " ".join(text.split()[:length]) for text in texts[i * job.batch : (i + 1) * job.batch]]
        for i, (side, (length, before)) in enumerate(sides.items())
    }
    trainer = DPOTrainer(
        trl_model(),
        args=DPOConfig(**settings),
        train_dataset=datasets.Dataset.from_dict({side: texts * (job.rounds + 2) for side, texts in pairs.items()}),
        callbacks=[Turn(settings, report)],
    )
    clocked(trainer.ref_model, "forward", spent)
    trainer.train()


def trl_grpo() -> None:
    """Run TRL's GRPO with the KL to a reference, each rollout trained on `epochs` times."""
    import datasets
    from trl import GRPOConfig, GRPOTrainer

    settings = trl_settings() | {
        "max_steps": job.epochs * (job.rounds + 2),
        "num_generations": job.samples,
        "num_iterations": job.epochs,
        "max_completion_length": job.response,
        "generation_kwargs": {"min_new_tokens": job.response},
        "temperature": 1.0,
        "beta": 0.04,
        "loss_type": "grpo",
        "bf16": job.dtype == "bfloat16",
    }
    spent: dict[str, float] = {}

    def report(start: float, end: float) -> dict[str, Any]:
        rollout, before = spent.pop("_generate"), spent.pop("_generate_and_score_completions")
        phases = {"rollout": rollout, "scoring": before - rollout, "update": end - start - before}
        return {"seconds": end - start, "tokens": job.batch * job.response, "phases": phases}

    prompts = random_texts(job.batch // job.samples, job.prompt)
    trainer = GRPOTrainer(
        trl_model(),
        characters,
        args=GRPOConfig(**settings),
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts * (job.rounds + 2)}),
        callbacks=[Turn(settings, report, steps=job.epochs)],
        **({"peft_config": lora("CAUSAL_LM")} if job.lora_rank else {}),
    )
    for method in ("_generate", "_generate_and_score_completions"):
        clocked(trainer, method, spent)
    trainer.train()


def peak_bytes() -> int:
    """Peak memory of the device, if it has its own memory, otherwise of this process."""
    if job.device == "cpu":
        return peak_resident()
    return torch.cuda.max_memory_allocated()


HF = {
    "limits": limits,
    "generate": generation,
    "engine": generation,
    "logprobs": scoring,
    "sft": supervised,
    "reward": supervised,
}
TRL = {"dpo": trl_dpo, "ppo": trl_ppo, "grpo": trl_grpo}

if __name__ == "__main__":
    if name == "trl":
        TRL[job.case]()
    else:
        repeat = HF[job.case]()
        turns.ready("torch", "transformers")
        turns.serve(repeat, peak_bytes)
