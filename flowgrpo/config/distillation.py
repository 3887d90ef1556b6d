"""Checks of a distillation: its teachers, and settings that need scored candidates."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from flowgrpo.core.errors import ConfigError
from flowgrpo.data.prompts import Prompt
from flowgrpo.losses.teachers import PIPELINE, Teacher
from flowgrpo.policy.settings import Full, Sampling


def assigns_credit(algorithm: Any) -> bool:
    """Whether an algorithm's advantages come from scored candidates."""
    return bool(getattr(algorithm, "assigns_credit", True))


def teacher_sampling(teacher: Teacher, student: Sampling) -> Sampling:
    """The arguments of the pipeline's call with which a teacher samples, on the student's grid."""
    guidance = student.guidance_scale if teacher.guidance_scale is None else teacher.guidance_scale
    return replace(student, guidance_scale=guidance, call={**student.call, **teacher.call})


def check_distillation(config: Any) -> None:
    """Check the teachers of a configuration, and what excludes an algorithm that judges nothing.

    Raises:
        ConfigError: With the key and what to change.
    """
    if not assigns_credit(config.algorithm):
        _check_uses_of_rewards(config)
    elif not config.rewards:
        raise ConfigError(
            "rewards: there are none, and the algorithm trains on them; add a table [[rewards]]"
        )
    teachers = config.loss.needs.teachers
    if teachers and teachers.models:
        _check_whole_models(config, teachers.models[0], teachers.all[0].weights == "model")
    for number, teacher in enumerate(teachers.all if teachers else ()):
        key = f"loss.teachers[{number}]"
        sampling = teacher_sampling(teacher, config.sampling)
        try:
            sampling.check()
        except ValueError as error:
            text = str(error).replace("sampling.call", f"{key}.call")
            raise ConfigError(text.replace("set sampling.guidance_scale", f"set {key}.guidance_scale")) from error  # fmt: skip
        # With a fake score the student is a model of few steps, and the teacher is not.
        imitates = config.loss.needs.fake_score is None
        # Without an adapter to start from, the pipeline is the model before training as well.
        starts = bool(getattr(config.model.weights, "init", ""))
        is_base = teacher.is_base or (teacher.path == PIPELINE and not starts)
        if imitates and is_base and sampling == config.sampling:
            raise ConfigError(
                f"{key} is the model before training and samples as the student does (guidance_scale = "
                f"{sampling.guidance_scale}), so there is nothing to learn: give it another guidance_scale, or the "
                "path of an adapter"
            )


def _check_whole_models(config: Any, path: str, first: bool) -> None:
    """Raise ConfigError if the weights of a whole model cannot take the place of the student's.

    Args:
        config: The configuration.
        path: The model.
        first: Whether it is the first teacher.
    """
    key = f"loss.teachers: weights = 'model' of {path}"
    if config.parallel.is_sharded:
        raise ConfigError(
            f"{key} is not possible with parallel.shard = {config.parallel.shard!r}, which divides the student's weights "
            "alone; set it to 'off', or use an adapter as teacher"
        )
    fake = config.loss.needs.fake_score
    if fake is not None and first and not isinstance(config.model.weights, Full):
        raise ConfigError(
            f"{key} is not possible with the loss 'dmd' and an adapter as model.weights: the fake score begins as the "
            "first teacher, whose weights an adapter cannot hold; set model.weights.kind = 'full', or use an adapter "
            "as teacher"
        )
    if config.memory.quantize != "none":
        raise ConfigError(
            f"{key} is not possible with memory.quantize = {config.memory.quantize!r}: the student's weights have another "
            "form than the teacher's; set it to 'none', or use an adapter as teacher"
        )


def _check_uses_of_rewards(config: Any) -> None:
    """Raise ConfigError if a setting chooses or weights samples by rewards that train nothing."""
    name = type(config.algorithm).__name__
    for used, key in (
        (config.guard.is_active, "guard"),
        (config.train.refill > 0, "train.refill"),
        (config.train.staleness > 0, "train.staleness"),
    ):
        if used:
            raise ConfigError(
                f"{key} works on the rewards of an iteration, and {name} trains on none; remove it"
            )


def check_taught(config: Any, prompts: Sequence[Prompt]) -> None:
    """Check that each training prompt has a teacher, and each teacher a prompt.

    Raises:
        ConfigError: With the teacher's key or the prompt.
    """
    teachers = config.loss.needs.teachers
    if teachers is None:
        return
    found = set[str]()
    for prompt in prompts:
        try:
            teachers.of(prompt.metadata, 0)
        except ValueError as error:
            raise ConfigError(f"{error} (prompt {prompt.text[:80]!r})") from error
        found.add(str(prompt.metadata.get(teachers.task_key, "")))
    free = found - {tag for teacher in teachers.all for tag in teacher.tags}
    for number, teacher in enumerate(teachers.all):
        missing = [tag for tag in teacher.tags if tag not in found]
        known = ", ".join(map(repr, sorted(found)[:20]))
        if missing:
            raise ConfigError(
                f"loss.teachers[{number}].tags: no training prompt has {teachers.task_key!r} = {missing[0]!r} "
                f"(there are: {known})"
            )
        if not teacher.tags and not free:
            raise ConfigError(
                f"loss.teachers[{number}] has no tags and would teach nothing, because the other teachers name "
                f"all prompts ({known}); give it tags, or remove it"
            )
