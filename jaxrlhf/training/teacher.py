"""Teachers: frozen models with the tokenizer of the student, for distillation and as a reference of PPO and GRPO."""

import jax

from jaxrlhf import runtime, sharding, weights
from jaxrlhf.config import LoRA, ModelSource, Teacher, TokenizerSource
from jaxrlhf.data.tokenizer import Tokenizer, check_vocab, load_tokenizer
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.models import ModelConfig, for_length
from jaxrlhf.training import setup
from jaxrlhf.training.abstract import build
from jaxrlhf.training.adapters import quantize
from jaxrlhf.types import Params


def teacher_model(
    settings: Teacher, section: str, student: Tokenizer, path: str, mesh: jax.sharding.Mesh, longest: int
) -> ModelConfig:
    """The teacher that a config's `section` names for the student at `path`, for sequences of up to `longest` tokens,
    before any weights are read. Raises ConfigError for one with another tokenizer, or a context that is too short,
    and DataError for a reward model."""
    where = f"{section}.path {settings.path}"
    folder = weights.tokenizer_folder(settings.path, settings.revision)
    tokenizer = load_tokenizer(folder, TokenizerSource(template_date=student.template_date))
    if difference := vocabulary_difference(tokenizer, student):
        raise ConfigError(
            f"{where} has another vocabulary than the model, {path}: {difference}. Their probabilities are compared "
            "token by token, so both need the same tokenizer; choose a teacher of the model's family"
        )
    dtype = runtime.resolve_dtype(settings.dtype, sharding.platform(mesh))
    source = ModelSource(path=settings.path, revision=settings.revision, compute_dtype=dtype, remat="none")
    model = setup.model_config(source, tokenizer, None, LoRA(), mesh)
    if model.head != "lm":
        raise DataError(f"{where} is a reward model; a teacher is a language model")
    check_vocab(student, model.vocab_size)
    what = f"for the teacher {settings.path}, the longest sequence"
    setup.check_context(longest, model, what, "data.max_length, data.max_prompt_length or sampling.response_length")
    return for_length(model, longest)


def load_teacher(settings: Teacher, model: ModelConfig, mesh: jax.sharding.Mesh) -> Params:
    """The parameters of the teacher on the mesh, quantised if `teacher.quantize` is set; shapes inside
    `weights.abstract_weights()`."""
    _, params = weights.load(
        settings.path, revision=settings.revision, dtype=model.dtype, compute_dtype=model.dtype, head="lm", mesh=mesh
    )
    if settings.quantize != "none":
        packed = LoRA(enabled=True, quantize=settings.quantize)
        params = build(lambda p: quantize(p, packed), mesh, params)
    return params


def vocabulary_difference(teacher: Tokenizer, student: Tokenizer) -> str:
    """The first difference between two vocabularies; "" if the student's ids mean the same to the teacher."""
    if teacher.has_ids_of(student):
        return ""
    if teacher.size < student.size:
        return f"it has {teacher.size} tokens and the model {student.size}"
    ids = range(student.size)
    pairs = zip(teacher.convert_ids_to_tokens(ids), student.convert_ids_to_tokens(ids), strict=True)
    others = [(i, theirs, ours) for i, (theirs, ours) in enumerate(pairs) if theirs != ours]
    if not others:
        return "the tokens are the same, but texts are divided into them differently"
    i, theirs, ours = others[0]
    return f"{len(others)} of {student.size} tokens differ, the first is {i}: {theirs!r} there, {ours!r} here"
