"""The table ``[train.replay]``: earlier groups that are trained on again, and the runs that cannot."""

from dataclasses import dataclass
from typing import Any, Literal

from flowgrpo.algorithms.trajectories import TrajectoryPlan
from flowgrpo.config.steps import steps_of_any_iteration
from flowgrpo.core.errors import ConfigError
from flowgrpo.core.random import Random
from flowgrpo.core.text import counted


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """Earlier groups that are trained on again (after OP-GRPO, arXiv:2604.04142)."""

    groups: int = 0
    """Groups that an iteration trains on again, besides the fresh ``train.groups``; a multiple of what
    ``train.groups`` must be a multiple of. 0 replays none."""
    capacity: int = 64
    """Groups that are stored; the oldest are forgotten. They are part of checkpoints."""
    keep: Literal["good", "all"] = "good"
    """Which trajectories of a group are stored: the ``good`` ones, with a positive advantage, or ``all`` with
    an advantage."""
    skip_last: int = 2
    """Denoising steps at the end of the grid that are not replayed: they inject little noise, so that their
    ratios are ill-conditioned under a policy that has moved."""
    max_weight: float = 2.0
    """Largest importance weight of a trajectory; larger ones are set to it."""


def check_replay(config: Any, num_processes: int) -> None:
    """Check that a :class:`flowgrpo.config.Config` can replay earlier groups, if it does.

    Raises:
        ConfigError: With the key and what to change.
    """
    settings, train, algorithm = config.train.replay, config.train, config.algorithm
    if settings.groups == 0:
        return
    key, loss = f"train.replay.groups = {settings.groups}", config.loss
    step = num_processes * (train.updates if train.split == "groups" else 1)
    if settings.groups % step:
        nearest = max(step, round(settings.groups / step) * step)
        raise ConfigError(
            f"{key} cannot be divided among the {counted(num_processes, 'process')} and the optimizer steps; the nearest "
            f"that can is {nearest}"
        )
    if settings.capacity < settings.groups:
        raise ConfigError(
            f"{key} needs a train.replay.capacity of at least as many groups, got {settings.capacity}"
        )
    _check_skipped(config)
    problem = ""
    if algorithm.action_kind != "step" or loss.needs.old_policy is not None:
        problem = "only denoising steps with a density have importance weights"
    elif not _has_trajectories(config):
        problem = (
            f"{type(algorithm).__name__} judges branches or states, and the weight is that of a whole trajectory; "
            "use flow_grpo, dance_grpo, mix_grpo or pref_grpo"
        )
    elif loss.needs.whole_groups or loss.needs.single_update:
        problem = f"the loss {type(loss).__name__} needs whole groups of the present policy"
    elif train.staleness:
        problem = "train.staleness = 1 trains on actions of other weights already; set it to 0"
    elif config.guard.is_active:
        problem = "the guards judge the candidates of the iteration alone; remove [guard]"
    elif getattr(algorithm, "needs_baseline", False):
        problem = "a learned baseline judges the candidates of the iteration alone"
    if problem:
        also = "or set" if "; " in problem else "set"
        raise ConfigError(f"{key} is not possible here: {problem}; {also} it to 0")


def _check_skipped(config: Any) -> None:
    """Raise ConfigError if all steps that are trained are left out of replays."""
    settings = config.train.replay
    steps = config.sampling.num_steps
    if settings.skip_last >= steps - 1:
        raise ConfigError(
            f"train.replay.skip_last = {settings.skip_last} leaves nothing to replay of {counted(steps, 'step')}, of which the "
            f"last is never trained; use at most {max(0, steps - 2)}"
        )
    first = min(steps_of_any_iteration(config, config.algorithm), default=0)
    if config.algorithm.action_kind == "step" and first >= steps - settings.skip_last:
        raise ConfigError(
            f"train.replay.groups = {settings.groups} replays nothing: the steps that are trained begin with {first}, and "
            f"train.replay.skip_last = {settings.skip_last} leaves out those from {steps - settings.skip_last} on; "
            "lower it, or set train.replay.groups = 0"
        )


def _has_trajectories(config: Any) -> bool:
    """Whether an algorithm's one candidate per sample judges a whole trajectory."""
    algorithm = config.algorithm
    try:
        plan = algorithm.plan(config.sampling.num_steps, 0, Random(config.run.seed))
    except (AttributeError, NotImplementedError):
        return False
    # Subclasses have further candidates, which judge single steps.
    return type(plan) is TrajectoryPlan
