"""Sections shared by several methods. The text under each field is its help in `jaxrlhf new` and `--help`."""

import dataclasses
import re
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from jaxrlhf.config.base import (
    AboveOne,
    AxisSize,
    BatchSize,
    Bool,
    Count,
    FilePath,
    Fraction,
    FractionBelowOne,
    LearningRate,
    Natural,
    NonNegative,
    Positive,
    Seed,
    Text,
    section,
)
from jaxrlhf.config.model import LoRA, ModelSource, TokenizerSource


@section
class Source:
    """A data set, and how its rows are read."""

    path: FilePath = ""
    """JSON, JSONL (.gz), CSV or Parquet file, folder saved by `datasets`, or hub id. Required."""
    split: str = "train"
    """Split of a hub dataset or `datasets` folder; for other folders, reads the files with this word in their names."""
    subset: str = ""
    """Configuration name of a hub dataset that has several, e.g. `main` of openai/gsm8k."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns to rename before the format is recognised: {standard name: name in the file}."""
    template: Text = ""
    """Prompt template with {column} fields, for data without a finished prompt. No chat template is applied to it. On
    the command line `\\n` is a newline, in a file only in double quotes."""
    score: str = ""
    """Score to use where a data set has several: a column, or in UltraFeedback a key of each completion or annotation.
    Empty: `score`; `helpfulness` of HelpSteer; `fine-grained_score` of UltraFeedback."""
    completion_prefix: Text = ""
    """Text inserted between a plain-text prompt and its completion, e.g. a space."""
    control_tokens: Bool = False
    """Parse control tokens such as `<|im_end|>` in plain-text columns as special tokens; in chat messages they always
    stay text."""
    max_rows: Count | None = None
    """Use only the first rows."""
    max_line_mb: Count = 64
    """Longest line of a JSONL or CSV file in MB. A longer one is taken for a mistake, and not read to its end."""
    max_gz_ratio: AboveOne = 100
    """Maximum ratio of the unpacked to the packed size of a .gz file; checked beyond 1 GB unpacked."""
    validation_path: FilePath = ""
    """Held-out rows: a file, folder or hub id, also that of `path` with another split."""
    validation_split: str = ""
    """Split of `validation_path` (empty: of `path`) with the held-out rows. Empty: the first of validation, test and
    dev that `validation_path` has."""
    validation_fraction: FractionBelowOne = 0.0
    """Fraction of `path` to hold out instead. The split depends only on `split_seed` and the number of rows. With
    `mix`, that of `data` is for all entries that name no held-out rows of their own."""

    def __post_init__(self) -> None:
        for option in ("validation_path", "validation_split"):
            if getattr(self, option) and self.validation_fraction:
                raise ValueError(
                    f"data.{option} and data.validation_fraction ({self.validation_fraction:g}) both hold rows out; "
                    f"set data.validation_fraction to 0, or leave out data.{option}"
                )

    @property
    def holds_out(self) -> bool:
        """Some rows are held out."""
        return bool(self.validation_path or self.validation_split or self.validation_fraction)


@section
class MixedSource(Source):
    """A data set of a mixture."""

    weight: Positive | None = None
    """Share of this data set in training, relative to the other weights: 3 and 1 are three rows of one to one row of
    the other. None, for all data sets of the mixture: their numbers of rows."""
    name: str = ""
    """Name in the log. Empty: that of the file, folder or hub data set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.path:
            raise ValueError("path is empty; every entry of data.mix names a data set")
        if not re.fullmatch(r"|[\w.-]+", self.name):
            raise ValueError(f"name is {self.name!r}; use letters, digits and . _ -")

    @property
    def label(self) -> str:
        """`name`, or the last part of the path without suffixes."""
        stem = re.sub(r"(\.(jsonl?|ndjson|csv|parquet|gz))+$", "", Path(self.path).name)
        return self.name or re.sub(r"[^\w.-]+", "_", stem)


@section
class Data(Source):
    """The dataset. Its format is recognised from the columns; `jaxrlhf data FILE` shows how a file is read."""

    mix: tuple[MixedSource, ...] = ()
    """Data sets to train on together, in place of `path`: a list. A batch has rows of each by its weight. Options that
    say how rows are read and held out belong to the entries, which have these keys:"""
    mix_temperature: Positive = 1.0
    """Exponent 1 / temperature of the weights of `mix`: above 1, small data sets are seen more often."""
    token_cache: FilePath = ""
    """Folder to keep tokenised rows in, for data larger than memory: they are read and tokenised a few thousand at a
    time, once, and each is read from disk when it is needed. Empty: rows are kept in memory."""
    max_length: Count = 512
    """Maximum tokens of prompt and completion together."""
    max_prompt_length: Count | None = None
    """Maximum tokens of the prompt. None: limited by max_length only."""
    truncation: Literal["drop", "error", "left", "right"] = "drop"
    """Handling of rows that are too long. drop: skip them. error: stop. left: truncate the start of the prompt. right:
    truncate the end of the completion."""
    split_by: Literal["row", "prompt"] = "row"
    """Unit that `validation_fraction` holds out. prompt: all rows of a prompt, so that no prompt is on both sides."""
    split_seed: Natural = 0
    """Seed of the train/validation split."""
    shuffle: Bool = True
    """Shuffle each epoch; the order depends only on `seed` and the epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.mix:
            if self.mix_temperature != 1:
                raise ValueError(
                    f"data.mix_temperature is {self.mix_temperature:g}, and data.mix is empty; leave it out"
                )
            return
        default = Source()
        of_entries = (key for key in READING if key != "validation_fraction")
        if both := [key for key in of_entries if getattr(self, key) != getattr(default, key)]:
            raise ValueError(
                f"data.mix is given, and data.{both[0]} too ({getattr(self, both[0])!r}); it belongs to an entry: "
                f"data.mix.0.{both[0]}, for example"
            )
        labels = [source.label for source in self.mix]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(f"two data sets of data.mix are called {twice[0]!r} in the log; give each a name")
        weights = [source.weight for source in self.mix]
        if None in weights and any(weights):  # a weight is positive
            missing = [source.path for source in self.mix if source.weight is None]
            raise ValueError(
                f"data.mix has weights, but none for {', '.join(missing)}; give each data set a weight, or none of "
                "them (their numbers of rows)"
            )

    @property
    def sources(self) -> "tuple[Data, ...]":
        """The data sets, each as the config of it alone; empty if none is named."""
        if not self.mix:
            return (self,) if self.path else ()
        sources = []
        for source in self.mix:
            options = {key: getattr(source, key) for key in READING}
            if not source.holds_out:
                options["validation_fraction"] = self.validation_fraction
            sources.append(dataclasses.replace(self, mix=(), mix_temperature=1.0, **options))
        return tuple(sources)

    @property
    def name(self) -> str:
        """The path, or those of a mixture."""
        return ", ".join(source.path for source in self.sources)

    @property
    def holds_out(self) -> bool:
        """Some rows are held out."""
        return super().holds_out or any(source.holds_out for source in self.mix)


READING = tuple(field.name for field in dataclasses.fields(Source))
"""Options of a single data set."""


@section
class Optim:
    """Optimizer with a learning rate schedule and gradient clipping."""

    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer. muon: orthogonalised momentum for the matrices of layers (https://arxiv.org/abs/2502.16982), AdamW for
    everything else. Its updates have the size of AdamW's in long runs, so begin with the same learning_rate; short runs
    may need two to four times it. Takes less memory: one moment per matrix."""
    learning_rate: LearningRate = 1e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Schedule after warmup; linear and cosine decay to `final_lr_fraction` at the last step."""
    warmup_steps: Natural = 0
    """Steps of linear warmup."""
    final_lr_fraction: Fraction = 0.0
    """Final learning rate as a fraction of the peak."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay; not applied to norms and biases."""
    beta1: FractionBelowOne = 0.9
    """Adam's decay rate of the first moment."""
    beta2: FractionBelowOne = 0.999
    """Adam's decay rate of the second moment."""
    eps: Positive = 1e-8
    """Adam's epsilon."""
    momentum: FractionBelowOne = 0.95
    """muon: momentum (Nesterov)."""
    max_grad_norm: Positive = 1.0
    """Maximum global norm of the gradient (clipping). Use a very large number to disable it."""
    idle_steps: Natural = 5
    """Steps in a row that teach nothing, after which the run stops with exit code 6: the gradient is zero or vanishing,
    or statistics of the scores are not finite. The first of them gives a warning (alarm/gradient, alarm/scores), and a
    run that ends sooner stops if they are its last half. 0: warn only."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which the moments are stored; updates are computed in float32. bfloat16 halves their memory and
    rounds the second moment stochastically."""
    offload: Bool = False
    """PPO and GRPO: keep the moments in host memory except during the update."""

    def __post_init__(self) -> None:
        if self.momentum != 0.95 and self.name != "muon":
            raise ValueError(
                f"optim.momentum is {self.momentum:g} and optim.name {self.name}, whose momentum is optim.beta1; leave "
                "it out, or use muon"
            )


@section
class Train:
    """Training loop of SFT, reward modelling and DPO."""

    num_train_epochs: Positive = 1.0
    """Passes over the data; may be fractional."""
    max_steps: Count | None = None
    """Maximum number of optimizer steps, even if epochs remain. None: no limit."""
    batch_size: BatchSize = 8
    """Rows per optimizer step, over all devices."""
    micro_batch_size: Count | None = None
    """Rows per forward pass (gradient accumulation); must divide batch_size. None: batch_size. Affects memory and
    speed, not the result."""
    micro_batch_tokens: Count | None = None
    """Tokens per forward pass, padding included, in place of micro_batch_size: rows of like length share a micro-batch,
    no wider than they need, so that little of it is padding. Affects memory and speed, not the result."""
    eval_every: Natural = 0
    """Optimizer steps between evaluations on held-out rows. 0: once per epoch."""
    keep_best: Bool = True
    """Export the state with the best `metric` instead of the last one, if there are held-out rows."""
    metric: str = ""
    """Evaluation metric that selects the best state. Empty: eval/loss for SFT and score regression, eval/accuracy for
    other reward models, eval/rewards/accuracies for DPO (eval/rewards/margins for kto)."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Direction of `metric`: max if higher is better, min if lower. auto: min for a loss, entropy, error or KL,
    else max."""
    eval_batch_size: BatchSize = 16
    """Rows per forward pass of evaluation."""
    packing: Bool = False
    """Pack several examples into each row of data.max_length tokens (pairs: twice that), with attention confined to
    each example. Batch sizes, epochs and steps then count packed rows, so a step trains on more examples."""


@section
class Mesh:
    """Device mesh: replica x data x fsdp x tensor. One of the sizes may be -1: all devices that the others leave."""

    replica: AxisSize = 1
    """Number of groups of devices with a copy of the parameters each; batches are split over them. The outermost axis:
    use it across hosts or TPU slices, whose connections are slow."""
    data: AxisSize = 1
    """Data-parallel size: the same as `replica`, within a host or slice. 0 means -1, as in older configs."""
    fsdp: AxisSize = 1
    """Number of devices to shard parameters and optimizer state over (batches are sharded too)."""
    tensor: AxisSize = 1
    """Tensor-parallel size: each device computes a share of the attention heads, MLP columns and vocabulary. Must
    divide the numbers of heads and of key-value heads."""

    def __post_init__(self) -> None:
        for axis in ("replica", "fsdp", "tensor"):
            if getattr(self, axis) == 0:
                raise ValueError(
                    f"mesh.{axis} is 0: an axis has at least one device; -1 takes all devices that the others leave"
                )
        free = [axis for axis in ("replica", "data", "fsdp", "tensor") if getattr(self, axis) < 1]
        if len(free) > 1:
            sizes = " and ".join(f"mesh.{axis} ({getattr(self, axis)})" for axis in free)
            raise ValueError(
                f"{sizes} would each take the devices that the other axes leave, which only one axis can; give the "
                "others a size"
            )


@section
class Logging:
    """Console output and metric loggers. metrics.jsonl is always written to the run directory."""

    log_every: Count = 1
    """Steps between logged metrics."""
    sample_every: Natural = 10
    """Steps between printed sample generations. 0: never."""
    num_samples: Count = 3
    """Number of samples to print."""
    token_samples: Natural = 8
    """Number of sequences of PPO and GRPO recorded token by token in tokens/ whenever samples are due: log-probs, KL,
    advantages, entropy and the most probable alternatives. Costs two forward passes of these sequences. 0: none."""
    report: Bool = True
    """Write report.html, a page about the run, when it starts, when samples or evaluations are logged (at most every 30
    seconds) and when it ends."""
    tensorboard: Bool = True
    """Write TensorBoard event files."""
    wandb_project: str = ""
    """Weights & Biases project to log to (needs the extra `wandb`). Empty: none."""
    trackio_project: str = ""
    """trackio project to log to, on this machine (needs the extra `trackio`). Empty: none."""
    tags: Literal["ours", "trl"] = "ours"
    """Names of metrics in TensorBoard, W&B and trackio. trl: TRL's where it has the metric under another name.
    metrics.jsonl always has ours."""
    tag_prefix: str = ""
    """Text before the names in TensorBoard, W&B and trackio, except those that begin with eval/: `train/` for the
    charts of runs of TRL."""
    quiet: Bool = False
    """Suppress console output."""


@section
class Checkpoint:
    """Checkpoints of the full training state, for resuming."""

    save_every: Natural = 50
    """Steps between checkpoints. 0: only at the end and when the run is interrupted."""
    save_minutes: NonNegative = 0.0
    """Minutes after which a checkpoint is written at the end of a step, besides those of `save_every`. 0: none."""
    keep: Count = 2
    """Number of most recent checkpoints to keep."""
    grace: Positive = 30.0
    """Seconds between the signal to stop (SIGTERM) and the end of the process by force, as your cluster grants them. A
    run whose steps take longer warns of it, before its first step if it is resumed, else after it."""
    synchronous: Literal["auto", "always", "never"] = "auto"
    """Block training while a checkpoint is written. auto: write in the background if a copy of the state fits in free
    memory."""


@section
class BaseConfig:
    """Base of the configs of all methods. A subclass sets `method` and the default of `run_dir`."""

    method: ClassVar[str]
    run_dir: FilePath = "runs"
    """Output directory: checkpoints, metrics and the exported model."""
    seed: Seed = 0
    """Random seed."""
    model: ModelSource = ModelSource()
    lora: LoRA = LoRA()
    tokenizer: TokenizerSource = TokenizerSource()
    data: Data = Data()
    optim: Optim = Optim()
    mesh: Mesh = Mesh()
    logging: Logging = Logging()
    checkpoint: Checkpoint = Checkpoint()

    def __post_init__(self) -> None:
        """Check options against each other. Raises ValueError."""
        if self.optim.name == "muon" and self.lora.enabled:
            raise ValueError(
                "optim.name is muon and lora.enabled true, but muon is for whole matrices, and adapters would all be "
                "left to AdamW; use adamw"
            )
