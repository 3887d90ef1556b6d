"""The batch geometry of a run in words, to be checked before a long run."""

from typing import Any

from flowgrpo.core.random import Random
from flowgrpo.core.text import counted


def geometry(config: Any, num_processes: int = 1) -> dict[str, str]:
    """The batch geometry in words, to be checked before a long run."""
    t, size = config.train, config.algorithm.group_size
    samples = t.groups * size
    shares = config.parallel.shares(num_processes)
    calls = -(-samples // shares // t.rollout_batch)
    epochs = f" in {counted(t.epochs, 'epoch')}" if t.epochs > 1 else ""
    refill = (
        f"; at most {t.refill + 1} times as much, as groups of equal rewards are replaced"
        if t.refill
        else ""
    )
    sampled = {
        "groups x samples": f"{counted(t.groups, 'prompt')} x {counted(size, 'sample')} = {samples} per iteration",
        "processes": f"{_processes(config, num_processes)}, {counted(t.groups // shares, 'group')} on each",
        "rollout": f"{counted(calls, 'call')} of {counted(min(t.rollout_batch, samples // shares), 'sample')} on each process",
        "per prompt": _work(config) + refill,
    }
    given = _given(config, num_processes)
    return {
        **(given or sampled | _beside(config)),
        "optimizer steps": f"{t.optimizer_steps} per iteration{epochs}, {_update_words(config)} in each",
        "in all": f"{counted(t.iterations, 'iteration')}, {counted(t.iterations * samples, 'picture' if given else 'sample', ',')}, {counted(t.iterations * t.optimizer_steps, 'optimizer step', ',')}",
        "denoising": f"{counted(config.sampling.num_steps, 'step')}, guidance {config.sampling.guidance_scale if config.sampling.guidance_scale is not None else 'as the pipeline has it'}",
    }


def _processes(config: Any, num_processes: int) -> str:
    """The processes, or those of them that work on different groups, in words."""
    number = config.parallel.context
    if number == 1:
        return f"{num_processes}"
    shares = config.parallel.shares(num_processes)
    sets = f"{counted(shares, 'set')} of {number}"
    return f"{num_processes}, as {sets} that compute each sample together (parallel.context)"


def _update_words(config: Any) -> str:
    """The part of an iteration that one optimizer step trains on, in words."""
    t, size = config.train, config.algorithm.group_size
    kind = "example" if config.algorithm.num_targets else "group"
    return {
        "groups": counted(t.groups // t.updates, kind),
        "samples": f"{counted(size // t.updates, 'sample')} of each of the {counted(t.groups, 'group')}",
        "steps": f"an equal part of the denoising steps of all {counted(t.groups, 'group')}",
        "actions": f"an equal random part of the actions of all {counted(t.groups, 'group')}",
    }[t.split]


def _work(config: Any) -> str:
    """The cost of the first iteration per prompt, in words."""
    random = Random(config.run.seed).at("train", 0)
    cost = config.algorithm.cost(config.sampling.num_steps, 0, random)
    # An algorithm of one's own need not have the property.
    pairs = getattr(config.algorithm, "comparisons", 0)
    judged = f" and {counted(pairs, 'comparison', ',')} by the judge" if pairs else ""
    return f"{counted(cost.nfe, 'denoiser evaluation', ',.0f')}, {counted(cost.decodes, 'decode', ',.0f')}, {counted(cost.rewards, 'call', ',.0f')} of each reward{judged} in the first iteration"


def _beside(config: Any) -> dict[str, str]:
    """What is drawn or trained on beside an iteration's samples, in words: previews and earlier groups."""
    rows = {}
    previews, replay = getattr(config.algorithm, "previews", None), config.train.replay
    if previews and previews.number:
        rows["previews"] = (
            f"{previews.number} of {counted(previews.num_steps, 'step')} per prompt choose its {counted(config.algorithm.group_size, 'sample')}"
        )
    if replay.groups:
        rows["replay"] = (
            f"{counted(replay.groups, 'earlier group')} in an iteration, of the newest {replay.capacity}"
        )
    return rows


def _given(config: Any, num_processes: int) -> dict[str, str]:
    """The batch geometry of given pictures in words; empty where pictures are sampled."""
    groups, number = config.train.groups, config.algorithm.num_targets
    if not number:
        return {}
    shares = config.parallel.shares(num_processes)
    return {
        "examples": f"{counted(groups, 'example')} x {counted(number, 'picture')} = {groups * number} per iteration; nothing is sampled",
        "processes": f"{_processes(config, num_processes)}, {counted(groups // shares, 'example')} on each",
    }
