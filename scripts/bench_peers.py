"""Torch peers of bench.py, which starts `bench_peers.py NAME JOB` in their own environment.

hf    transformers: generate, and plain torch for scoring and training
trl   trl.experimental.ppo, one iteration per turn
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

from bench_process import Job, Turns, peak_resident, timed
from bench_shapes import SHAPES, gemms

Repeat = Callable[[], dict[str, Any]]
turns = Turns()
name, job = sys.argv[1], Job(**json.loads(sys.argv[2]))
if job.dtype == "bfloat16" and name == "trl":
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


def trl_iterations() -> None:
    """Run TRL's PPO. `train` runs all iterations; a callback after each reports it and waits for the next turn."""
    import datasets
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    tokenizer = transformers.AutoTokenizer.from_pretrained(job.model)
    rows = [{"input_ids": row.tolist()} for row in random_tokens(job.batch, job.prompt)]
    micro = job.micro_batch or job.batch
    config = PPOConfig(
        output_dir=str(Path(job.work) / "trl"),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=job.batch // micro,
        num_mini_batches=1,
        num_ppo_epochs=job.epochs,
        total_episodes=job.batch * (job.rounds + 2),
        local_rollout_forward_batch_size=job.batch,
        response_length=job.response,
        temperature=1.0,
        learning_rate=1e-6,
        gradient_checkpointing=job.checkpointing,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=job.device == "cpu",
    )
    clock = {"start": 0.0, "rollout": 0.0, "update": 0.0}
    generate = ppo_trainer.batch_generation

    def rollout(*args: Any, **kwargs: Any) -> Any:
        clock["start"] = time.perf_counter()
        result = generate(*args, **kwargs)
        wait()
        clock["rollout"] = time.perf_counter()
        clock["update"] = 0.0
        return result

    class Turn(transformers.TrainerCallback):
        warm = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            wait()
            end = time.perf_counter()
            if self.warm:
                phases = {
                    "rollout": clock["rollout"] - clock["start"],
                    "scoring": clock["update"] - clock["rollout"],
                    "update": end - clock["update"],
                }
                tokens = job.batch * job.response
                turns.say(seconds=end - clock["start"], tokens=tokens, phases=phases)
            else:
                turns.ready("torch", "transformers", "trl", "accelerate")
                self.warm = True
            if not turns.go():
                turns.say(peak_bytes=peak_bytes())
                os._exit(0)

    ppo_trainer.batch_generation = rollout
    value, adapted = torch_model("SequenceClassification", "float32"), {}
    if rank := job.lora_rank:
        import peft

        def lora(task: str) -> Any:
            return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type=task)

        value, adapted = peft.get_peft_model(value, lora("SEQ_CLS")), {"peft_config": lora("CAUSAL_LM")}
    trainer = PPOTrainer(
        config,
        tokenizer,
        model=torch_model("CausalLM", "float32"),
        ref_model=None if adapted else torch_model("CausalLM", "float32"),  # the policy without its adapters
        reward_model=torch_model("SequenceClassification", "float32"),
        value_model=value,
        train_dataset=datasets.Dataset.from_list(rows),
        callbacks=[Turn()],
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

if __name__ == "__main__":
    if name == "trl":
        trl_iterations()
    else:
        repeat = HF[job.case]()
        turns.ready("torch", "transformers")
        turns.serve(repeat, peak_bytes)
