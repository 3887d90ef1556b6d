"""Algorithm, transition, loss and advantage combine freely: each combination runs or is refused with the reason."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

import flowgrpo
from flowgrpo.algorithms import (
    FIND,
    G2RPO,
    TPGRPO,
    VGPO,
    BranchGRPO,
    DanceGRPO,
    DiffusionNFT,
    FlowGRPO,
    Matching,
    MixGRPO,
    PrefGRPO,
    TempFlowGRPO,
)
from flowgrpo.config import Config, ConfigError, Model, Prompts, Run, Train
from flowgrpo.config.reference import to_table
from flowgrpo.core.multi_reward_advantages import GDPO, LogTamed, PerLoss, PerReward
from flowgrpo.core.random import Random
from flowgrpo.core.single_reward_advantages import BetaAdvantage, GroupAdvantage, VirtualBest
from flowgrpo.core.steps import Window
from flowgrpo.core.transitions import CPS, DDIM, ODE, DanceSDE, FlowSDE, require_path
from flowgrpo.data.prompts import Group, Prompt
from flowgrpo.losses.clipped import ClippedLoss
from flowgrpo.losses.nft import NFTLoss
from flowgrpo.policy import LoRA, PipelinePolicy
from flowgrpo.rewards.pairs import PointwisePreference
from flowgrpo.rewards.scorer import RewardScorer
from flowgrpo.rewards.settings import Failures, Reward
from flowgrpo.training.learner import Learner
from tests.conftest import MakePolicy, sampling_of

HERE = "tests.test_combinations"
T, G = 4, 4
GROUPS = [Group(0, Prompt("a red cube")), Group(1, Prompt("two dogs"))]


def brightness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media.flatten(1).mean(1)


def redness(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    return media[:, 0].flatten(1).mean(1)


def odd(media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """0 or 1, by the last digit of the brightness."""
    return (media.flatten(1).mean(1) * 1e4).floor() % 2


ALGORITHMS: dict[str, Any] = {
    "flow_grpo": FlowGRPO(group_size=G),
    "dance_grpo": DanceGRPO(group_size=G),
    "mix_grpo": MixGRPO(group_size=G, steps=Window(size=2), flash=0.5, solver="dpm_2m"),
    "pref_grpo": PrefGRPO(group_size=G, preference=PointwisePreference(reward="odd")),
    "diffusion_nft": DiffusionNFT(group_size=G),
    "tempflow_grpo": TempFlowGRPO(group_size=G, seeds=2),
    "g2rpo": G2RPO(group_size=G, steps=Window(size=2), granularities=(1, 2)),
    "tp_grpo": TPGRPO(group_size=G),
    "vgpo": VGPO(group_size=G),
    "branch_grpo": BranchGRPO(group_size=G, splits=(0, 1)),
}
TRANSITIONS: dict[str, Any] = {
    "flow_sde": FlowSDE(),
    "dance_sde": DanceSDE(),
    "cps": CPS(),
    "unnormalised": CPS(log_prob="unnormalised"),
    "ddim": DDIM(),
}
LOSSES: dict[str, Any] = {
    "plain": ClippedLoss(clip_range=0.1),
    "guard": ClippedLoss(clip_range=0.1, ratio="guard", kl_coef=0.1, kl="velocity"),
    "bounded": ClippedLoss(clip_range=0.1, clip="kl", kl_coef=0.1),
    "compatible": ClippedLoss(clip_range=0.1, kl_coef=0.1, kl="flow_grpo"),
    "nft": NFTLoss(),
}
ADVANTAGES: dict[str, Any] = {
    "group": GroupAdvantage(),
    "batch": GroupAdvantage(std="batch"),
    "beta": BetaAdvantage(),
    "virtual_best": VirtualBest(best=3.0),
    "per_reward": PerReward(),
    "per_loss": PerLoss(),
    "gdpo": GDPO(),
    "log_tamed": LogTamed(),
}
BY_STEPS = ("tp_grpo", "vgpo", "branch_grpo")
"""They compare what is no raw score."""
ADD_UP = (*BY_STEPS, "tempflow_grpo", "g2rpo")
"""An action's advantage is made of several."""


def is_senseless(algorithm: str, transition: str, loss: str, advantage: str) -> bool:
    """What the mathematics does not allow, whatever the model."""
    if (algorithm == "diffusion_nft") != (loss == "nft"):
        return True
    if loss == "compatible" and transition in ("cps", "unnormalised", "ddim"):
        return True
    if advantage == "beta" and algorithm in (*BY_STEPS, "pref_grpo"):
        return True
    if advantage == "per_loss" and (algorithm in ADD_UP or loss == "nft"):
        return True
    if advantage == "virtual_best" and algorithm == "tp_grpo":
        return True
    return advantage == "batch" and algorithm in BY_STEPS


def config(algorithm: Any, loss: Any, *, binary: bool) -> Config:
    both = (Reward(model=f"{HERE}:brightness"), Reward(model=f"{HERE}:redness", weight=0.5))
    odd = Reward(model=f"{HERE}:odd", weight=float(binary))
    return Config(
        model=Model(path=""),
        sampling=sampling_of("sd3", num_steps=T),
        algorithm=algorithm,
        loss=loss,
        rewards=(odd,) if binary else (*both, odd),
        prompts=Prompts(train="", held_out=""),
        train=Train(iterations=1, groups=2, updates=2, lr=1e-4, monitor_states=0),
        run=Run(folder=""),
    )


def combined(algorithm: str, transition: str, loss: str, advantage: str) -> Config:
    """A configuration of these four; what samples without noise has its own transition."""
    made = replace(ALGORITHMS[algorithm], advantage=ADVANTAGES[advantage])
    if algorithm != "diffusion_nft":
        made = replace(made, transition=TRANSITIONS[transition])
    return config(made, LOSSES[loss], binary=advantage == "beta")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_senseless_is_refused_and_nothing_else(algorithm: str) -> None:
    for transition, loss, advantage in product(TRANSITIONS, LOSSES, ADVANTAGES):
        settings = combined(algorithm, transition, loss, advantage)
        if is_senseless(algorithm, transition, loss, advantage) and not (
            algorithm == "diffusion_nft" and loss == "nft" and advantage not in ("beta", "per_loss")
        ):
            with pytest.raises(ConfigError, match=r"^(algorithm|loss)"):
                settings.check()
        else:
            settings.check()


WRONG_PARTS: dict[str, tuple[Any, str]] = {
    "advantage": (GroupAdvantage(clip=0.0), "advantage.clip must be above 0"),
    "steps": (Window(start=T), f"num_steps = {T}"),
    "depths": (Window(start=T), f"num_steps = {T}"),
    "transition": (ODE(), "injects no noise"),
    "timestep_fraction": (0.0, "algorithm.timestep_fraction must be"),
    "preference": (PointwisePreference(tie_margin=-1.0), "algorithm.preference"),
}


def test_an_algorithm_checks_each_of_its_parts() -> None:
    for made in (*ALGORITHMS.values(), FIND(group_size=G), Matching(group_size=G)):
        made.check(T)
        for part in {f.name for f in fields(made)} & set(WRONG_PARTS):
            wrong, message = WRONG_PARTS[part]
            # ODE is the only transition of those that draw no noise at the steps.
            if getattr(made, part) != wrong:
                with pytest.raises(ValueError, match=message):
                    replace(made, **{part: wrong}).check(T)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_files_say_the_same(algorithm: str) -> None:
    """Each combination can be written in a file, with no code."""
    made = ALGORITHMS[algorithm]
    for advantage in ADVANTAGES.values():
        table = to_table(replace(made, advantage=advantage))
        settings = [
            "sampling.num_steps=4",
            f"algorithm={_inline(table)}",
            *(["loss={kind='nft'}"] if algorithm == "diffusion_nft" else []),
        ]
        read = flowgrpo.load("quickstart_flow_grpo", settings).algorithm
        assert read == replace(made, advantage=advantage)


def _inline(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else repr(value)


# True iterations: every algorithm with every transition, every loss and every advantage.


def runs_of(algorithm: str) -> Iterator[tuple[str, str, str, str]]:
    """Combinations in which each choice occurs, with others that are not always the same."""
    sound = [
        c
        for c in product(TRANSITIONS, LOSSES, ADVANTAGES)
        if not is_senseless(algorithm, *c) and (algorithm != "diffusion_nft" or c[0] == "flow_sde")
    ]
    missing = {(i, choice) for c in sound for i, choice in enumerate(c)}
    while missing:
        best = max(sound, key=lambda c: len(missing & set(enumerate(c))))
        missing -= set(enumerate(best))
        yield (algorithm, *best)


@pytest.fixture(scope="module")
def policies(make_policy: MakePolicy) -> Callable[[str], PipelinePolicy]:
    made: dict[str, PipelinePolicy] = {}

    def policy(name: str) -> PipelinePolicy:
        if name not in made:
            made[name] = make_policy(
                name,
                sampling=sampling_of(name, num_steps=T),
                weights=LoRA(rank=2, alpha=4),
                with_reference=True,
            )
        return made[name]

    return policy


@pytest.mark.parametrize(
    "combination", [c for a in ALGORITHMS for c in runs_of(a)], ids=lambda c: "-".join(c)
)
def test_it_runs(
    combination: tuple[str, str, str, str],
    policies: Callable[[str], PipelinePolicy],
    accelerator: Accelerator,
) -> None:
    settings = combined(*combination)
    algorithm: Any = settings.algorithm
    policy = policies("sd15" if combination[1] == "ddim" else "sd3")
    learner = Learner(policy, settings.train, settings.loss, accelerator)
    scorer = RewardScorer(settings.rewards, Failures(retries=0))
    random = Random(2).at("train", 0)
    with learner.behaviour_policy():
        experience = algorithm.collect(policy, GROUPS, scorer, random, 0)
    scorer.close()
    advantages = algorithm.advantages(experience)
    metrics = learner.update(experience, advantages, random)
    assert advantages.isfinite().all()
    assert (advantages != 0).any()
    assert all(torch.tensor(v).isfinite() for v in metrics.values()), metrics
    assert metrics["grad_norm"] > 0
    assert metrics["skipped_updates"] == 0


def test_a_transition_on_the_other_path_ends_a_run_before_any_long_work(tmp_path: Path) -> None:
    settings = [
        "algorithm.transition.kind=ddim",
        "run.device=cpu",
        "run.threads=1",
        f"run.folder='{tmp_path / 'run'}'",
    ]
    with pytest.raises(ConfigError, match=r"algorithm\.transition: ddim is defined on a diffusion"):
        flowgrpo.train(flowgrpo.load("quickstart_flow_grpo", settings))
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()
    for transition in (FlowSDE(), DanceSDE()):
        with pytest.raises(ValueError, match="use the transition 'ddim' or 'cps'"):
            require_path(transition, "diffusion")
