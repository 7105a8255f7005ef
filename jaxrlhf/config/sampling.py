"""Sections on generation: how tokens are sampled, and in which form the policy decodes."""

from typing import Literal

from jaxrlhf.config.base import Bool, Count, FractionBelowOne, Natural, Positive, PositiveFraction, Text, section


@section
class Sampling:
    """Sampling parameters for generation."""

    response_length: Count = 64
    """Maximum number of generated tokens."""
    min_length: Natural = 0
    """Minimum number of tokens before a stop token may be sampled."""
    temperature: Positive = 1.0
    """Sampling temperature. For greedy decoding set `greedy` (`--greedy` of `jaxrlhf generate`)."""
    greedy: Bool = False
    """Greedy decoding; temperature, top_k, top_p and min_p are ignored."""
    top_k: Natural = 0
    """Sample from the k most probable tokens only. 0: disabled."""
    top_p: PositiveFraction = 1.0
    """Nucleus sampling: the smallest set of tokens with total probability top_p. 1: disabled."""
    min_p: FractionBelowOne = 0.0
    """Minimum token probability, as a fraction of the most probable token's. 0: disabled."""
    renormalise_logprobs: Bool = False
    """Compute training log-probs, KL and entropy over the tokens left by top_k, top_p, min_p and min_length, instead of
    the full vocabulary. Stores one bit per response token and vocabulary entry."""
    stop_token_ids: tuple[Natural, ...] = ()
    """Additional stop tokens, besides those of the tokenizer and generation_config.json."""
    stop_strings: tuple[Text, ...] = ()
    """Strings that end a response. A control token of the tokenizer, such as <|im_end|>, is a stop token. Other strings
    are looked for after generation: tokens beyond the one that completes a stop string are removed. The completion text
    ends before the string."""

    def __post_init__(self) -> None:
        if self.min_length > self.response_length:
            raise ValueError(
                f"sampling.min_length is {self.min_length} and sampling.response_length {self.response_length}: no "
                "response could end; lower sampling.min_length"
            )
        if "" in self.stop_strings:
            raise ValueError("sampling.stop_strings has an empty text, which ends every response at once; remove it")


@section
class Generation:
    """Generation during training: the policy is copied into a form optimised for decoding."""

    dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Dtype of the decoding copy. auto: model.compute_dtype. Any other choice samples from a slightly different policy:
    training log-probs are always recomputed, and val/sampler_logprob_gap reports the difference."""
    layout: Literal["auto", "replicated", "sharded"] = "auto"
    """Layout of the decoding copy on the mesh. replicated: split over mesh.tensor only, so that each device decodes its
    rows by itself. sharded: split over mesh.fsdp too, as in training: less memory, but devices exchange activations of
    all rows at every token. auto: replicated if that takes at most a quarter of a device's memory."""
    devices: Natural = 0
    """Number of devices, the last ones, that only roll out: they draw the responses of the next update while the others
    train on those of the last, which `sampler_correction` then weights, as their policy is one update older. The mesh
    is made of the other devices. 0: all devices roll out and train in turns."""
    slots: Natural = 0
    """Number of rows decoded concurrently; a finished row is replaced by the next prompt (continuous batching). 0: the
    whole batch. Fewer slots use less memory, and less time if response lengths vary a lot."""
