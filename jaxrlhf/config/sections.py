"""The sections of a run's config: one dataclass each, the meaning of every option under it."""

from typing import Annotated, Literal

from pydantic import Field

from jaxrlhf.config.base import (
    Bool,
    Count,
    DType,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    section,
)


@section
class ModelSource:
    """Where a model comes from and in which precision it lives."""

    path: str = ""
    """A folder in Hugging Face layout (adapters in PEFT's too), a run directory, or a hub id. Required."""
    revision: str | None = None
    """Branch, tag or commit on the hub; pin a commit to make a run repeatable."""
    merged_path: str = ""
    """If `path` holds adapters in PEFT's layout, they are merged into their model: a folder to write that model to."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` builds the model from config.json alone."""
    param_dtype: DType = "auto"
    """Storage. auto: float32 for what trains; for what is frozen, the compute dtype."""
    compute_dtype: DType = "auto"
    """Operands of matrix products; sums, norms, softmax, losses stay float32. auto: float32 on CPU, else bfloat16."""
    remat: Literal["auto", "none", "full", "dots"] = "auto"
    """What backward recomputes to save memory: nothing, whole layers, or all but matrix products. auto: full on a CPU,
    where recomputing takes no longer than writing everything down, none elsewhere."""
    attention: Literal["auto", "plain", "cudnn"] = "auto"
    """How training and scoring attend. cudnn: one kernel on an NVIDIA card, in bfloat16. auto: that where a small trial
    agrees with plain, which is said at the start; plain elsewhere."""


@section
class TokenizerSource:
    """Which tokenizer, and the decisions it leaves open."""

    path: str = ""
    """A folder or hub id; empty: the model's own."""
    chat_template: str = "auto"
    """auto: the tokenizer's own, if any. none: plain text. `chatml` adds a chat format to a tokenizer without one.
    Or a .jinja file."""
    pad_token: str | None = None
    """None: the tokenizer's own; failing that a reserved token; failing that eos (masks never come from ids)."""
    eos_token: str | None = None
    """None: the tokenizer's own."""


@section
class Data:
    """Rows to train on. Formats are recognised from the columns; see `jaxrlhf data FILE`."""

    path: str = ""
    """JSON, JSONL (.gz), CSV or Parquet file, a `datasets` folder, or a hub id. Required."""
    split: str = "train"
    """Split of a `datasets` folder or hub id; of a plain folder, the files with this word in their names."""
    subset: str = ""
    """Configuration of a hub data set that has several, `main` of openai/gsm8k for example."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Rename columns before the format is recognised, {our name: name in the file}."""
    template: str = ""
    """Prompt text with {column} fields, for rows without a finished prompt. Used as it is: no chat format around it."""
    completion_prefix: str = ""
    """Text between prompt and completion where both are plain text, a space for example."""
    control_tokens: Bool = False
    """Read control tokens spelt out in plain text columns (`<|im_end|>`) as such. Those in messages are always text."""
    max_rows: Count | None = None
    """Use the first rows only."""
    max_length: Count = 512
    """Tokens of prompt and completion together."""
    max_prompt_length: Count | None = None
    """Tokens of the prompt; None: what max_length leaves."""
    truncation: Literal["drop", "error", "left", "right"] = "drop"
    """What happens to a row that is too long. left and right cut the prompt (left) or the completion (right)."""
    validation_path: str = ""
    """Held-out rows from a file of their own."""
    validation_fraction: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Or a share of `path`, chosen by `split_seed` and the number of rows alone."""
    split_seed: Natural = 0
    shuffle: Bool = True
    """A new order each epoch, a function of (seed, epoch)."""


@section
class Optim:
    """AdamW, a schedule and a clip."""

    learning_rate: Positive = 1e-5
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """After the warm-up: stay, or fall to `final_lr_fraction` at the last step."""
    warmup_steps: Natural = 0
    final_lr_fraction: Fraction = 0.0
    weight_decay: NonNegative = 0.0
    """Decoupled; never on norms and biases."""
    beta1: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.999
    eps: Positive = 1e-8
    max_grad_norm: Positive = 1.0
    """Global norm above which a gradient is scaled down; a very large number switches it off."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of Adam's two moments; steps are computed in float32. bfloat16 takes half of the memory, and rounds the
    second moment stochastically."""
    offload: Bool = False
    """PPO: the moments are in the host's memory while responses are drawn, scored and annotated, and on the device for
    the update alone."""


@section
class Train:
    """Epochs and batches of supervised training (SFT, reward models)."""

    num_train_epochs: Positive = 1.0
    max_steps: Count | None = None
    """Stop after so many optimizer steps, whatever the epochs."""
    batch_size: Count = 8
    """Rows per optimizer step over all devices."""
    micro_batch_size: Count | None = None
    """Rows per forward pass; None: all. A divisor of batch_size. Changes memory, not the result."""
    eval_every: Natural = 0
    """Optimizer steps between evaluations; 0: at the end of each epoch."""
    keep_best: Bool = True
    """With held-out rows: what is saved at the end is the best state by `metric`."""
    metric: str = ""
    """Any key of a record that ends an evaluation. Empty: eval/loss in SFT and for scores, eval/accuracy for other
    reward models, eval/rewards/accuracies for DPO (kto: eval/rewards/margins)."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether the best is the greatest or the least. auto: the least loss, entropy, error or KL, else the
    greatest."""
    eval_batch_size: Count = 16
    packing: Bool = False
    """Put examples together into rows of data.max_length tokens (pairs: of twice that), where none sees another. Then
    all three batch sizes, epochs and steps count such rows: an optimizer step learns from more examples."""


@section
class Mesh:
    """Devices as data x fsdp x tensor. 1 x 1 x 1 is one device; data 0 takes what the other two leave."""

    data: Natural = 1
    fsdp: Count = 1
    tensor: Count = 1


@section
class Logging:
    """What a run says while it works. metrics.jsonl is always written."""

    log_every: Count = 1
    sample_every: Natural = 10
    """Steps between printed generations; 0: never."""
    num_samples: Count = 3
    tensorboard: Bool = True
    wandb_project: str = ""
    """Log to this Weights & Biases project too (extra `wandb`)."""
    quiet: Bool = False


@section
class Checkpoint:
    """When the whole state goes to disk."""

    save_every: Natural = 50
    """Steps between checkpoints; 0: only at the end and when asked to stop."""
    keep: Count = 2
    """How many of the latest stay."""
    synchronous: Literal["auto", "always", "never"] = "auto"
    """auto: write in the background unless free memory is less than the state."""


@section
class Sampling:
    """How a response is drawn."""

    response_length: Count = 64
    """Most tokens of a response."""
    min_length: Natural = 0
    """No stop token before so many tokens."""
    temperature: Positive = 1.0
    greedy: Bool = False
    """Always the likeliest token; temperature and filters do not count."""
    top_k: Natural = 0
    """0: off."""
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Keep tokens at least so likely as a share of the likeliest."""
    renormalise_logprobs: Bool = False
    """PPO takes log-probs, KL and entropy over the tokens that top_k, top_p, min_p and min_length left, not over the
    whole vocabulary. The tokens are kept with the rollout: a bit for each response token and vocabulary entry."""
    stop_token_ids: tuple[Natural, ...] = ()
    """Besides those of the tokenizer and generation_config.json."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end a response too. It is cut after the token that completes one, when all is drawn; its text ends
    before it."""

    def __post_init__(self) -> None:
        if self.min_length > self.response_length:
            raise ValueError(
                f"sampling.min_length is {self.min_length} and sampling.response_length {self.response_length}: no "
                "response could end; set min_length lower"
            )
        if "" in self.stop_strings:
            raise ValueError("sampling.stop_strings has an empty text, which ends every response at once; leave it out")


@section
class Generation:
    """What draws the responses: a copy of the policy made for decoding, and how many rows it answers at a time."""

    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Weights and products of the copy. auto: model.compute_dtype. Another one samples from a slightly other policy:
    log-probs for training never come from it, and val/sampler_logprob_gap says how far it is off."""
    slots: Natural = 0
    """Rows answered at a time; where one ends, the next prompt begins. 0: the whole batch. Fewer take less memory, and
    less time where response lengths differ much."""
