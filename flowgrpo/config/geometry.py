"""The batch geometry of a run in words, to be checked before a long run."""

from typing import Any

from flowgrpo.core.random import Random


def geometry(config: Any, num_processes: int = 1) -> dict[str, str]:
    """The batch geometry in words, to be checked before a long run."""
    t, size = config.train, config.algorithm.group_size
    samples = t.groups * size
    shares = config.parallel.shares(num_processes)
    calls = -(-samples // shares // t.rollout_batch)
    epochs = f" in {t.epochs} epochs" if t.epochs > 1 else ""
    refill = (
        f"; at most {t.refill + 1} times as much, as groups of equal rewards are replaced"
        if t.refill
        else ""
    )
    sampled = {
        "groups x samples": f"{t.groups} prompts x {size} samples = {samples} per iteration",
        "processes": f"{_processes(config, num_processes)}, {t.groups // shares} groups on each",
        "rollout": f"{calls} call{'s' * (calls > 1)} of {min(t.rollout_batch, samples // shares)} samples on each process",
        "per prompt": _work(config) + refill,
    }
    given = _given(config, num_processes)
    return {
        **(given or sampled | _beside(config)),
        "optimizer steps": f"{t.optimizer_steps} per iteration{epochs}, {_update_words(config)} in each",
        "in all": f"{t.iterations} iterations, {t.iterations * samples:,} {'pictures' if given else 'samples'}, {t.iterations * t.optimizer_steps:,} optimizer steps",
        "denoising": f"{config.sampling.num_steps} steps, guidance {config.sampling.guidance_scale if config.sampling.guidance_scale is not None else 'as the pipeline has it'}",
    }


def _processes(config: Any, num_processes: int) -> str:
    """The processes, or those of them that work on different groups, in words."""
    number = config.parallel.context
    if number == 1:
        return f"{num_processes}"
    shares = config.parallel.shares(num_processes)
    sets = f"{shares} set{'s' * (shares > 1)} of {number}"
    return f"{num_processes}, as {sets} that compute each sample together (parallel.context)"


def _update_words(config: Any) -> str:
    """The part of an iteration that one optimizer step trains on, in words."""
    t, size = config.train, config.algorithm.group_size
    kind = "examples" if config.algorithm.num_targets else "groups"
    return {
        "groups": f"{t.groups // t.updates} {kind}",
        "samples": f"{size // t.updates} samples of each of the {t.groups} groups",
        "steps": f"an equal part of the denoising steps of all {t.groups} groups",
        "actions": f"an equal random part of the actions of all {t.groups} groups",
    }[t.split]


def _work(config: Any) -> str:
    """The cost of the first iteration per prompt, in words."""
    random = Random(config.run.seed).at("train", 0)
    cost = config.algorithm.cost(config.sampling.num_steps, 0, random)
    return f"{cost.nfe:,.0f} denoiser evaluations, {cost.decodes:,.0f} decodes, {cost.rewards:,.0f} calls of each reward in the first iteration"


def _beside(config: Any) -> dict[str, str]:
    """What is drawn or trained on beside an iteration's samples, in words: previews and earlier groups."""
    rows = {}
    previews, replay = getattr(config.algorithm, "previews", None), config.train.replay
    if previews and previews.number:
        rows["previews"] = (
            f"{previews.number} of {previews.num_steps} steps per prompt choose its {config.algorithm.group_size} samples"
        )
    if replay.groups:
        rows["replay"] = (
            f"{replay.groups} earlier groups in an iteration, of the newest {replay.capacity}"
        )
    return rows


def _given(config: Any, num_processes: int) -> dict[str, str]:
    """The batch geometry of given pictures in words; empty where pictures are sampled."""
    groups, number = config.train.groups, config.algorithm.num_targets
    if not number:
        return {}
    pictures = "pictures" if number > 1 else "picture"
    shares = config.parallel.shares(num_processes)
    return {
        "examples": f"{groups} examples x {number} {pictures} = {groups * number} per iteration; nothing is sampled",
        "processes": f"{_processes(config, num_processes)}, {groups // shares} examples on each",
    }
