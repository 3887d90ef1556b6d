"""Keys that have no effect because another key switches off what they belong to, and numbers above which nothing changes.

A configuration may hold such keys, for example one that switches off what the configuration that it extends
has on. They are named before a run and in a dry run, so that nobody takes them for settings of the run.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from flowgrpo.config.reference import is_required
from flowgrpo.core.random import Random


def equals(value: Any) -> Callable[[Any], bool]:
    """A test whether a switch has one value."""
    return lambda found: bool(found == value)


def is_one_of(*values: Any) -> Callable[[Any], bool]:
    """A test whether a switch has one of some values."""
    return lambda found: bool(found in values)


def differs(value: Any) -> Callable[[Any], bool]:
    """A test whether a switch has any other value."""
    return lambda found: bool(found != value)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Keys of a table, and the switch without which they have no effect.

    Attributes:
        table: Dotted path of the table, with ``*`` for each table of a list.
        keys: Keys of the table; empty for all but the switch.
        switch: A key of the same table, or the dotted path of one in the configuration.
        is_off: Whether a value of the switch leaves the keys without effect.
    """

    table: str
    keys: tuple[str, ...]
    switch: str
    is_off: Callable[[Any], bool]


RULES = (
    Rule("train.replay", (), "groups", equals(0)),
    Rule("train.early_stopping", (), "metric", equals("")),
    Rule("train", ("ema_every",), "ema_decay", equals(0)),
    Rule("train", ("split",), "updates", equals(1)),
    Rule("evaluation", ("images_during",), "every", equals(0)),
    Rule("guard", ("share", "adapt"), "kl", equals("all")),
    Rule("failures", ("wait",), "retries", equals(0)),
    # All of these advantages are 1, or 1 and -1.
    Rule("train", ("without_advantage",), "algorithm.kind", is_one_of("distillation", "dmd", "pairs")),
    Rule("evaluation.regimes.*", ("when",), "evaluation.every", equals(0)),
    Rule("memory", ("arithmetic",), "model.dtype", equals("float32")),
    Rule("model.weights", ("reference",), "init", equals("")),
    Rule("memory", ("offload_text_encoders", "offload_vae"), "run.device", equals("cpu")),
    Rule("memory", ("gradient_checkpointing",), "model.weights.kind", equals("noise")),
    Rule("rewards.*", ("scale", "shift", "clip", "log", "threshold", "schedule", "ignores_prompt"), "weight", equals(0)),
    Rule("rewards.*", ("schedule",), "algorithm.kind", is_one_of("dmd", "pictures", "pairs")),
    Rule("rewards.*", ("ignores_prompt",), "failures.probe", equals("off")),
    # Evaluations use the full weight.
    Rule("rewards.*", ("schedule",), "algorithm.score_rollouts", equals(False)),
    Rule("algorithm.previews", (), "number", equals(0)),
    Rule("algorithm.steps", ("decay_from",), "decay", equals(0)),
    Rule("algorithm.depths", ("decay_from",), "decay", equals(0)),
    Rule("algorithm", ("pruned_every", "pruned_until"), "pruned", equals(())),
    Rule("algorithm", ("pruned_until",), "pruned_every", equals(0)),
    Rule("algorithm", ("balance",), "turning_points", equals("none")),
    Rule("algorithm", ("anchor_steps",), "anchor", equals(0)),
    Rule("algorithm", ("integration",), "granularities", lambda found: len(found) == 1),
    Rule("algorithm", ("strides",), "granularities", equals((1,))),
    Rule("algorithm", ("matched",), "sampling.num_steps", equals(1)),
    Rule("algorithm.transition", ("log_prob",), "algorithm.kind", equals("dmd")),
    Rule("algorithm", ("invert_excess",), "branches", equals("denoise")),
    Rule("algorithm.advantage", ("ddof", "epsilon"), "std", equals("none")),
    Rule("algorithm.advantage", ("above",), "threshold", differs("fixed")),
    Rule("loss", ("power",), "weight", differs("ghuber")),
    Rule("loss", ("clip_range",), "surrogate", equals("pepg")),
    Rule("loss", ("proximal",), "proximal_coef", equals(0)),
    # The old policy then has the trained weights.
    Rule("loss", ("sampler", "sample_old_after"), "trail", equals("none")),
    # Without steps, or with one optimizer step, in which ratios are 1.
    Rule("loss", ("clip_range",), "algorithm.kind", is_one_of("dmd", "rtdmd")),
    Rule("loss.teachers.*", ("share",), "tags", differs(())),
)  # fmt: skip
"""Keys of tables that a kind of algorithm or loss does not have are passed over. What contradicts its
switch, where a value makes no sense at all, is refused by the table's own check instead."""


def idle_notes(config: Any) -> list[str]:
    """A sentence for each key that differs from its default and has no effect; none if all have one."""
    found = {}
    for rule in RULES:
        for path, table in _tables(config, rule.table.split("."), ""):
            of_table = hasattr(table, rule.switch)
            switch = f"{path}.{rule.switch}" if of_table else rule.switch
            value = _value(table if of_table else config, rule.switch)
            if value is _ABSENT or not rule.is_off(value):
                continue
            for name, own in _changed(table, rule):
                key = f"{path}.{name}"
                found[key] = (
                    f"{_shown(key, own)} has no effect while {_shown(switch, value)}: change {switch}, or remove "
                    f"{key}"
                )
    return [*found.values(), *excess_notes(config)]


@dataclasses.dataclass(frozen=True)
class Limit:
    """A number above which a key changes nothing any more.

    Attributes:
        key: Its dotted path, with ``*`` for each table of a list.
        most: The largest number that differs from smaller ones, by the configuration.
        reason: What the number follows from.
    """

    key: str
    most: Callable[[Any], int]
    reason: str


LIMITS = (
    # The sample of a group takes the level of its number plus the group's.
    Limit("loss.fake.num_times", lambda c: c.train.groups * (1 + c.train.refill) + c.algorithm.group_size - 1,
          "train.groups and algorithm.group_size, whose samples take turns with the noise levels"),
    Limit("train.monitor_states", lambda c: c.train.train_batch, "train.train_batch"),
    Limit("memory.decode_batch", lambda c: max(c.train.rollout_batch, c.train.train_batch),
          "train.rollout_batch and train.train_batch"),
    Limit("evaluation.regimes.*.images", lambda c: max(c.evaluation.images, c.evaluation.images_during),
          "evaluation.images"),
    Limit("algorithm.completion_steps", lambda c: c.sampling.num_steps, "sampling.num_steps"),
    Limit("algorithm.anchor_steps", lambda c: c.sampling.num_steps - 1, "sampling.num_steps"),
    Limit("algorithm.preference.opponents", lambda c: c.algorithm.group_size // 2, "algorithm.group_size"),
)  # fmt: skip
"""Numbers that are cut off silently. Batches may be larger than what there is to put into them."""


def excess_notes(config: Any) -> list[str]:
    """A sentence for each number that is larger than has an effect, and for keys that need two others."""
    notes = [*_of_teachers(config), *_of_single_steps(config), *_of_evaluations(config)]
    for limit in LIMITS:
        table, _, name = limit.key.rpartition(".")
        for path, here in _tables(config, table.split("."), ""):
            value = getattr(here, name, None)
            default = {f.name: f.default for f in dataclasses.fields(here)}.get(name)
            if value is None or value == default or value <= (most := limit.most(config)):
                continue
            notes.append(
                f"{path}.{name} = {value} has no other effect than {most}, which follows from {limit.reason}: lower it"
            )
    return notes


def _of_teachers(config: Any) -> Iterator[str]:
    """Keys that choose among teachers where there is nothing to choose."""
    needed = config.loss.needs.teachers
    if needed is None:
        return
    free = [i for i, t in enumerate(needed.all) if not t.tags]
    if needed.task_key != "tag" and len(free) == len(needed.all):
        yield f"{_shown('loss.task_key', needed.task_key)} has no effect while no teacher has tags: remove it"
    if len(free) == 1 and needed.all[free[0]].share != 1:
        yield (
            f"loss.teachers[{free[0]}].share = {needed.all[free[0]].share:g} has no effect, because no other teacher has "
            "prompts without tags: remove it"
        )


def _of_single_steps(config: Any) -> Iterator[str]:
    """Settings of the ratio that need a further step, or a further update."""
    loss, algorithm = config.loss, config.algorithm
    if getattr(loss, "step_weight", "none") != "none" and not config.train.replay.groups:
        random = Random(config.run.seed).at("train", 0)
        steps = algorithm.trained_steps(config.sampling.num_steps, 0, random)
        if len(steps) == 1 and getattr(algorithm, "steps_per", "iteration") == "iteration":
            yield (
                f"{_shown('loss.step_weight', loss.step_weight)} has no effect while an iteration trains one denoising "
                "step, because its weight, divided by the mean, is 1: train several (algorithm.steps), or remove it"
            )
    if getattr(loss, "kind", "") != "matching" or loss.surrogate == "pepg" or loss.clip_range == 1:
        return
    if loss.trail != "none" and loss.sampler == "trained":
        yield (
            f'loss.clip_range = {loss.clip_range:g} has no effect while loss.sampler = "trained", whose ratio is 1: change '
            "loss.sampler, or remove loss.clip_range"
        )
    elif loss.trail == "none" and config.train.optimizer_steps == 1:
        yield (
            f"loss.clip_range = {loss.clip_range:g} has no effect while an iteration has one optimizer step, whose ratio is 1: "
            "raise train.updates or train.epochs, or remove loss.clip_range"
        )


def _of_evaluations(config: Any) -> Iterator[str]:
    """Settings of evaluations that are never run, and of inspections that show nothing."""
    evaluation, iterations = config.evaluation, config.train.iterations
    if evaluation.every >= iterations and evaluation.images_during:
        yield (
            f"evaluation.images_during = {evaluation.images_during} has no effect while evaluation.every = "
            f"{evaluation.every} is not below train.iterations = {iterations}: lower evaluation.every, or remove it"
        )
    for index, bench in enumerate(evaluation.bench):
        if bench.when == "every" and not 0 < evaluation.every < iterations:
            yield (
                f'evaluation.bench[{index}].when = "every" is the same as "ends" here, because evaluation.every = '
                f"{evaluation.every} leaves no evaluation between both ends: change evaluation.every, or remove it"
            )
    if evaluation.inspected_prompts > 1 and not getattr(config.algorithm, "assigns_credit", True):
        yield (
            f"evaluation.inspected_prompts = {evaluation.inspected_prompts} has no effect while "
            f"{_shown('algorithm.kind', config.algorithm.kind)}, which has no advantages to show: remove it"
        )


_ABSENT = object()


def _tables(here: Any, parts: list[str], path: str) -> Iterator[tuple[str, Any]]:
    """The tables at a path, with their own paths."""
    if not parts:
        if dataclasses.is_dataclass(here):
            yield path, here
    elif parts[0] == "*":
        for index, one in enumerate(here):
            yield from _tables(one, parts[1:], f"{path}[{index}]")
    elif hasattr(here, parts[0]):
        yield from _tables(getattr(here, parts[0]), parts[1:], f"{path}.{parts[0]}".lstrip("."))


def _value(here: Any, switch: str) -> Any:
    """The value of a switch; ``_ABSENT`` if there is no such key."""
    for part in switch.split("."):
        here = getattr(here, part, _ABSENT)
    return here


def _changed(table: Any, rule: Rule) -> Iterator[tuple[str, Any]]:
    """The keys of a rule that a table has with another value than their default."""
    for field in dataclasses.fields(table):
        if field.name == rule.switch or is_required(field) or field.name == "kind":
            continue
        if rule.keys and field.name not in rule.keys:
            continue
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        value = getattr(table, field.name)
        if value != default:
            yield field.name, value


def _shown(key: str, value: Any) -> str:
    """A key and its value, as in a configuration."""
    return f"{key} = {json.dumps(value, ensure_ascii=False, default=str)}"
